"""The mean of the convolutions, and its gradients."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kfde_layers.fused.mfdf.cuda import launch, mean, tiling
from kfde_layers.testing import random_tensor
from tests.support.inputs import LAYOUTS
from tests.support.kernels import launches_of, needs_interpreter, recorded, runs_kernels, the_launch_of
from tests.support.mfdf_kernels import check_mean, each_small_map

pytestmark = [*runs_kernels, pytest.mark.usefixtures("guards")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_that_is_no_multiple_of_a_programs_samples(layout, monkeypatch):
    monkeypatch.setattr(tiling, "FILL", 0)  # programs of four samples, which large maps have
    with recorded(launch, run=True) as launches:
        check_mean(random_tensor(5, 3, 3, 5, seed=7, memory_format=LAYOUTS[layout]))
    assert the_launch_of(launches, "mfdf_mean_kernel").arguments["SAMPLES"] == 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "tap_spacing"),
    [(1, 1), (3, 1), (7, 1), (9, 1), (5, 2), (3, 3), (1, 2), (9, 2)],
)
def test_equals_the_reference(size, tap_spacing, layout):
    x = random_tensor(2, 5, 7, 11, memory_format=LAYOUTS[layout])
    check_mean(x, size, tap_spacing)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_small_map
def test_maps_smaller_than_the_kernel(height, width, size, tap_spacing, layout):
    x = random_tensor(2, 3, height, width, seed=7, memory_format=LAYOUTS[layout])
    check_mean(x, size, tap_spacing)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 37, 130])
def test_channels(channels, layout):
    x = random_tensor(2, channels, 3, 5, seed=8, memory_format=LAYOUTS[layout])
    check_mean(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, layout):
    x = random_tensor(3, 10, 5, 7, seed=9, dtype=dtype, memory_format=LAYOUTS[layout])
    check_mean(x, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_combined(layout, monkeypatch):
    monkeypatch.setattr(launch, "SAMPLES", 1)
    x = random_tensor(2, 2, 29, 31, seed=10, memory_format=LAYOUTS[layout])
    with recorded(launch, run=True) as launches:
        check_mean(x)
    assert the_launch_of(launches, "mfdf_mean_kernel").grid[1] > 1  # chunks of positions
    assert the_launch_of(launches, "mfdf_mean_backward_kernel").grid[1] > 1  # parts of the samples
    assert launches_of(launches, "mfdf_window_kernel")[-1].arguments["scale"] != 1


@pytest.mark.parametrize(("layout", "dtype"), [("nhwc", torch.bfloat16), ("nchw", torch.float32)])
def test_many_turns_of_every_loop_of_the_mean(layout, dtype, monkeypatch):
    monkeypatch.setattr(launch, "block_rows", lambda *_: 1)
    small_tiles = tiling.Tiling(block_hw=2, block_c=2, chunk=124, chunks=1, samples=4)
    monkeypatch.setattr(launch, "cut_into_tiles", lambda *_: small_tiles)
    monkeypatch.setattr(launch, "SAMPLES", 64)
    x = random_tensor(37, 2, 3, 41, seed=13, dtype=dtype, memory_format=LAYOUTS[layout])
    with recorded(launch, run=True) as launches:
        check_mean(x, 7)
    mean_arguments = the_launch_of(launches, "mfdf_mean_kernel").arguments
    backward = the_launch_of(launches, "mfdf_mean_backward_kernel").arguments
    coverage = launches_of(launches, "mfdf_coverage_kernel")[0].arguments  # the same in the backward pass
    along_width = launches_of(launches, "mfdf_window_kernel")[0].arguments  # the second one goes along the height
    assert coverage["SIZE"] ** 2 / coverage["BLOCK_TAPS"] > 32
    assert mean_arguments["chunk"] / mean_arguments["BLOCK_HW"] > 32
    assert backward["samples"] > 32
    assert (along_width["length"] - along_width["SIZE"] // 2) / along_width["BLOCK_L"] > 32

    monkeypatch.setattr(launch, "SAMPLES", 1)
    with recorded(launch, run=True) as launches:
        check_mean(random_tensor(37, 2, 3, 5, seed=13, dtype=dtype, memory_format=LAYOUTS[layout]))
    assert launches_of(launches, "mfdf_window_kernel")[0].arguments["groups"] > 32


def _without_far_side(first_last_tap):
    return lambda *args: (first_last_tap(*args)[0] * 0, first_last_tap(*args)[1])


@needs_interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "plant"),
    [("_first_last_tap", _without_far_side), ("_border_class", lambda _: lambda position, *_: position * 0 + 1)],
)
def test_a_wrong_kernel_is_seen(name, plant, layout, monkeypatch):
    monkeypatch.setattr(mean, name, plant(getattr(mean, name)))
    with pytest.raises(AssertionError, match=r"p: .* over the budget"):
        check_mean(random_tensor(2, 3, 5, 7, memory_format=LAYOUTS[layout]))
