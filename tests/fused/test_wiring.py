"""The CUDA part of the operators, run by the interpreter: the launchers accept the arguments of the operators."""

from contextlib import contextmanager

import pytest
import torch

from kfde_layers.testing import scatter_parameters

pytest.importorskip("triton", reason="Triton is not installed")

from kfde_layers import MFDF
from kfde_layers.fused.csfe import operator as csfe
from kfde_layers.fused.csfe.cuda import launch as csfe_launch
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.fused.mfdf import operator as mfdf
from kfde_layers.fused.mfdf.cuda import launch as mfdf_launch
from kfde_layers.testing import random_affine, random_tensor
from tests.support.agreement import with_gradients
from tests.support.inputs import LAYOUTS
from tests.support.kernels import INTERPRETED, recorded, runs_kernels, sigmoid_may_overflow

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, to run the code for CUDA on the CPU"),
    *runs_kernels,
    sigmoid_may_overflow,
]

OPERATORS = [
    (csfe._forward, csfe._forward_on_cuda),
    (csfe._backward, csfe._backward_on_cuda),
    (mfdf.mean_of_convolution, mfdf._mean_on_cuda),
    (mfdf._mean_backward, mfdf._mean_backward_on_cuda),
    (mfdf.merged_convolution, mfdf._merged_on_cuda),
    (mfdf._merged_backward, mfdf._merged_backward_on_cuda),
]


@contextmanager
def cuda_kernels_on_the_cpu():
    """Make the operators run their code for CUDA on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        for operator, kernel in OPERATORS:
            patch.setitem(operator._backend_fns, "cpu", kernel)
        for module in (csfe, mfdf):  # on the CPU the operators are left out where nobody looks
            patch.setattr(module, "nobody_looks", lambda *_: False)
        yield


def assert_cuda_equals_cpu(call):
    with (
        cuda_kernels_on_the_cpu(),
        recorded(csfe_launch, run=True) as csfe_launches,
        recorded(mfdf_launch, run=True) as mfdf_launches,
    ):
        on_cuda = call()
    assert bool(csfe_launches or mfdf_launches) == (on_cuda[0].numel() > 0)  # it was the kernels that ran
    for cuda_tensor, cpu_tensor in zip(on_cuda, call(), strict=True):
        assert cuda_tensor.dtype == cpu_tensor.dtype
        assert cuda_tensor.stride() == cpu_tensor.stride() or cuda_tensor.numel() == 0
        torch.testing.assert_close(cuda_tensor, cpu_tensor, rtol=1e-4, atol=1e-4)


def run(operation, tensors):
    y = operation(*tensors)
    cotangent = random_tensor(*y.shape[:3], 2 * y.shape[3], seed=5)[..., ::2]  # not dense
    return with_gradients(y, tensors, cotangent)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [CsfeOptions(5), CsfeOptions(with_sfe=True), CsfeOptions(5, with_sfe=True, scale=0.5)]
)
@pytest.mark.parametrize(("batch", "gaps"), [(0, 1), (2, 1), (2, 2)])
def test_csfe(options, layout, batch, gaps):
    x = random_tensor(batch, 10, 7, 5 * gaps, memory_format=LAYOUTS[layout])[..., ::gaps].requires_grad_()
    parameters = [p.requires_grad_() for p in random_affine(10)] if options.num_groups > 1 else []

    def operation(x, weight=None, bias=None):
        return torch.ops.kfde.csfe_fused(x, weight, bias, *options)[0]

    assert_cuda_equals_cpu(lambda: run(operation, [x, *parameters]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "gaps"), [(0, 1), (2, 1), (2, 2)])
def test_mfdf(layout, batch, gaps):
    x = random_tensor(batch, 6, 7, 5 * gaps, memory_format=LAYOUTS[layout])[..., ::gaps].requires_grad_()
    layer = scatter_parameters(MFDF(6, (1, 3, 5), dilation=2, impl="fused"))
    parameters = list(layer.parameters())
    assert_cuda_equals_cpu(lambda: run(lambda x, *_: layer(x), [x, *parameters]))
