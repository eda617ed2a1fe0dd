"""What the operators run on CUDA, run by the interpreter: the launchers take what the operators hand them."""

import os
from contextlib import contextmanager

import pytest
import torch

from kfde_layers.testing import scatter_parameters

pytest.importorskip("triton", reason="Triton is not installed")

from kfde_layers import MFDF
from kfde_layers.kernels import csfe as kernels_csfe
from kfde_layers.kernels import mfdf as kernels_mfdf
from kfde_layers.ops import csfe_fused as csfe
from kfde_layers.ops import mfdf_fused as mfdf
from kfde_layers.ops.csfe_moments import Enhancement
from kfde_layers.testing import random_affine, random_tensor
from tests.kernels.compiling import recorded

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, to run on the CPU what is for CUDA"
    ),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),  # the sigmoid is made for it
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # in older Tritons
]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


OPERATORS = [
    (csfe._forward, csfe._forward_on_cuda),
    (csfe._backward, csfe._backward_on_cuda),
    (mfdf.pooled_depthwise, mfdf._pool_on_cuda),
    (mfdf._pool_backward, mfdf._pool_backward_on_cuda),
    (mfdf.merged_depthwise, mfdf._merge_on_cuda),
    (mfdf._merge_backward, mfdf._merge_backward_on_cuda),
]


@contextmanager
def cuda_kernels_on_the_cpu():
    """The operators themselves, with all that they ask of a kernel's results, run what is for CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        for operator, kernel in OPERATORS:
            patch.setitem(operator._backend_fns, "cpu", kernel)
        yield


def assert_cuda_equals_cpu(call):
    with (
        cuda_kernels_on_the_cpu(),
        recorded(kernels_csfe, run=True) as some,
        recorded(kernels_mfdf, run=True) as others,
    ):
        on_cuda = call()
    assert bool(some or others) == (on_cuda[0].numel() > 0)  # it was the kernels that ran
    for mine, theirs in zip(on_cuda, call(), strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.stride() == theirs.stride() or mine.numel() == 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def with_gradients(operation, tensors):
    y = operation(*tensors)
    cotangent = random_tensor(*y.shape[:3], 2 * y.shape[3], seed=5)[..., ::2]  # not dense
    return [y.detach(), *torch.autograd.grad(y, tensors, cotangent)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [Enhancement(5), Enhancement(spatial=True), Enhancement(5, spatial=True, scale=0.5)]
)
@pytest.mark.parametrize(("batch", "gaps"), [(0, 1), (2, 1), (2, 2)])
def test_csfe(options, layout, batch, gaps):
    x = random_tensor(batch, 10, 7, 5 * gaps, memory_format=LAYOUTS[layout])[..., ::gaps].requires_grad_()
    parameters = [p.requires_grad_() for p in random_affine(10)] if options.num_groups > 1 else []

    def operation(x, weight=None, bias=None):
        return torch.ops.kfde.csfe_fused(x, weight, bias, *options)[0]

    assert_cuda_equals_cpu(lambda: with_gradients(operation, [x, *parameters]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "gaps"), [(0, 1), (2, 1), (2, 2)])
def test_mfdf(layout, batch, gaps):
    x = random_tensor(batch, 6, 7, 5 * gaps, memory_format=LAYOUTS[layout])[..., ::gaps].requires_grad_()
    layer = scatter_parameters(MFDF(6, (1, 3, 5), dilation=2, impl="fused"))
    parameters = list(layer.parameters())
    assert_cuda_equals_cpu(lambda: with_gradients(lambda x, *_: layer(x), [x, *parameters]))
