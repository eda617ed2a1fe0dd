"""What the operators run on CUDA, run by the interpreter: the launchers take what the operators hand them."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kfde_layers.ops import csfe_fused, mfdf_fused
from kfde_layers.ops.csfe_moments import Enhancement
from kfde_layers.testing import random_affine, random_map

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, to run on the CPU what is for CUDA"
    ),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),  # the sigmoid is made for it
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # in older Tritons
]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def assert_same(on_cuda, on_cpu):
    for mine, theirs in zip(on_cuda, on_cpu, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [Enhancement(5), Enhancement(spatial=True), Enhancement(5, spatial=True, scale=0.5)]
)
@pytest.mark.parametrize("batch", [0, 2])
def test_csfe(options, layout, batch):
    x = random_map(batch, 10, 7, 5, memory_format=LAYOUTS[layout])
    weight, bias = random_affine(10) if options.num_groups > 1 else (None, None)
    outputs = [f(x, weight, bias, *options) for f in (csfe_fused._forward_on_cuda, torch.ops.kfde.csfe_fused)]
    assert_same(*outputs)
    arguments = (x, x, weight, bias, *outputs[1][1:], *options)
    assert_same(csfe_fused._backward_on_cuda(*arguments), torch.ops.kfde.csfe_fused_backward(*arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [0, 2])
def test_mfdf(layout, batch):
    x = random_map(batch, 6, 7, 5, memory_format=LAYOUTS[layout])
    generator = torch.Generator().manual_seed(1)
    kernel, alpha, grid, shifts, dp = (
        torch.randn(shape, generator=generator)
        for shape in ((6, 5, 5), (batch, 3, 6), (3, 6, 5, 5), (batch, 6), (batch, 6))
    )
    operators = torch.ops.kfde
    assert_same([mfdf_fused._pool_on_cuda(x, kernel, 2)], [operators.pooled_depthwise(x, kernel, 2)])
    assert_same(
        mfdf_fused._pool_backward_on_cuda(dp, x, kernel, 2), operators.pooled_depthwise_backward(dp, x, kernel, 2)
    )
    arguments = (x, alpha, grid, shifts, 2)
    assert_same([mfdf_fused._merge_on_cuda(*arguments)], [operators.merged_depthwise(*arguments)])
    arguments = (x, x, alpha, grid, 2)
    assert_same(mfdf_fused._merge_backward_on_cuda(*arguments), operators.merged_depthwise_backward(*arguments))
