from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from kfde_layers.fused import maps
from kfde_layers.fused.mfdf.asked import Asked
from kfde_layers.fused.mfdf.cuda import launch, tiling
from kfde_layers.testing import random_tensor
from tests.support.inputs import LAYOUTS
from tests.support.kernels import DEVICE, recorded, runs_kernels
from tests.support.mfdf_kernels import (
    RESULTS,
    assert_within_budget,
    draw,
    run_mean,
    run_mean_reference,
    run_merged,
    run_merged_reference,
)

pytestmark = [*runs_kernels, pytest.mark.usefixtures("guards")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_that_are_not_dense(layout):
    x = random_tensor(3, 4, 5, 7, seed=15, memory_format=LAYOUTS[layout], device=DEVICE)
    dp, bias = torch.tensor(0.7, device=DEVICE).expand(3, 4), draw(4, 3, seed=16).t()
    alpha, stacked_kernels = draw(3, 4, 2, seed=17).transpose(1, 2), draw(3, 3, 4, 2, seed=18).permute(3, 2, 0, 1)
    assert_within_budget(RESULTS[:3], run_mean, run_mean_reference, (dp, x, stacked_kernels[0]), 1)
    assert_within_budget(RESULTS[3:], run_merged, run_merged_reference, (x, x, alpha, stacked_kernels, bias), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch(layout):
    x = random_tensor(0, 6, 5, 7, memory_format=LAYOUTS[layout], device=DEVICE)
    kernel, alpha, stacked_kernels = draw(6, 3, 3, seed=0), draw(0, 2, 6, seed=0), draw(2, 6, 3, 3, seed=0)
    with recorded(launch) as launches:
        p, dx, dkernel = run_mean(draw(0, 6, seed=0), x, kernel, 1)
        y, dx_too, dalpha, dstacked, dbias = run_merged(x, x, alpha, stacked_kernels, draw(0, 6, seed=0), 1)
    assert not launches
    assert y.shape == dx.shape == dx_too.shape == x.shape
    assert p.shape == dbias.shape == (0, 6)
    assert dalpha.shape == alpha.shape
    assert torch.equal(dkernel, torch.zeros_like(kernel))
    assert torch.equal(dstacked, torch.zeros_like(stacked_kernels))


def test_same_bits_every_time():
    x = random_tensor(2, 3, 29, 31, seed=19, device=DEVICE)
    mean_inputs, merged_inputs = (
        (draw(2, 3, seed=20), x, draw(3, 3, 3, seed=21)),
        (draw(2, 2, 3, seed=22), draw(2, 3, 3, 3, seed=23)),
    )
    first, second = (
        [*run_mean(*mean_inputs, 1), *run_merged(x, x, *merged_inputs, draw(2, 3, seed=24), 1)] for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@triton.jit
def _address_kernel(out_ptr, n, c, i, j, height, width, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # noqa: N803
    tl.store(out_ptr, maps.address(n, c, i, j, height, width, C, CHANNELS_LAST))


def test_addresses_can_pass_32_bits():
    n, c, i, j, height, width, channels = 500_000, 5, 3, 11, 67, 61, 6
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _address_kernel[(1,)](out, n, c, i, j, height, width, channels, False)
    assert int(out) == ((n * channels + c) * height + i) * width + j > 2**33
    _address_kernel[(1,)](out, n, c, i, j, height, width, channels, True)
    assert int(out) == ((n * height + i) * width + j) * channels + c


def test_forward_launches():
    x = torch.empty((64, 96, 56, 56), device="meta", memory_format=torch.channels_last)
    parameters = [torch.empty(shape, device="meta") for shape in ((64, 4, 96), (4, 96, 7, 7), (64, 96))]
    with recorded(launch) as launches:
        launch.launch_mean(x, parameters[1][0], 1)
        launch.launch_merged(x, *parameters, 1)
    assert [kernel_launch.name for kernel_launch in launches] == [
        "mfdf_coverage_kernel",
        "mfdf_mean_kernel",
        "mfdf_merged_kernel",
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(64, 96, 56, 56), (64, 192, 28, 28), (64, 384, 14, 14), (64, 768, 7, 7), (1, 96, 56, 56)]
)
def test_strips_waste_little_and_occupy_the_machine(shape, layout):
    batch, channels, _, width = shape
    cut = tiling.cut_into_strips(*shape, layout == "nhwc", 2, 1, neighbours=4, warps=4096, least=7)
    assert cut.across * cut.block_p * cut.segment <= width * 8 / 7
    warps = batch * triton.cdiv(channels, cut.block_c) * cut.parts() * cut.block_p * cut.block_c / 32
    assert warps >= (2000 if batch > 1 else 200)


@pytest.fixture(scope="module")
def arguments():
    dy, x = random_tensor(2, 2, 3, 4, device=DEVICE), random_tensor(2, 2, 3, 4, seed=1, device=DEVICE)
    return dy, x, draw(2, 3, 2, seed=3), draw(3, 2, 3, 3, seed=4), draw(2, 2, seed=5)


@pytest.fixture(scope="module")
def everything(arguments):
    dy, x, alpha, kernels, dp = arguments
    merged = launch.launch_merged_backward(dy, x, alpha, kernels, 1, Asked())
    return merged, launch.launch_mean_backward(dp, x, kernels[0], 1, True, True)


@pytest.mark.parametrize("asked", list(product((True, False), repeat=4)), ids=str)
def test_only_the_gradients_that_are_asked_for(asked, arguments, everything):
    dy, x, alpha, kernels, dp = arguments
    assert_only(asked, launch.launch_merged_backward(dy, x, alpha, kernels, 1, Asked(*asked)), everything[0])
    assert_only(asked[:2], launch.launch_mean_backward(dp, x, kernels[0], 1, *asked[:2]), everything[1])


def assert_only(asked, some, everything):
    for wanted, gradient, expected in zip(asked, some, everything, strict=True):
        if wanted:
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
        else:
            assert gradient is None
