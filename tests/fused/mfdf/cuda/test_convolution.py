"""The convolution with merged kernels, and its gradients."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kfde_layers.fused.mfdf.cuda import convolution, launch, taps, tiling
from kfde_layers.testing import random_tensor
from tests.support.inputs import LAYOUTS
from tests.support.kernels import launches_of, needs_interpreter, recorded, runs_kernels
from tests.support.mfdf_kernels import check_merged, each_small_map

pytestmark = [*runs_kernels, pytest.mark.usefixtures("guards")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kernel_whose_first_taps_are_far_from_its_centre(layout):
    check_merged(random_tensor(1, 2, 2, 3, seed=7, memory_format=LAYOUTS[layout]), 1, 15)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("branches", "size", "tap_spacing"),
    [(1, 1, 1), (2, 3, 1), (3, 7, 1), (4, 9, 1), (2, 5, 2), (1, 3, 3), (3, 1, 2), (2, 9, 2)],
)
def test_equals_the_reference(branches, size, tap_spacing, layout):
    x = random_tensor(2, 5, 7, 11, memory_format=LAYOUTS[layout])
    check_merged(x, branches, size, tap_spacing)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_small_map
def test_maps_smaller_than_the_kernel(height, width, size, tap_spacing, layout):
    x = random_tensor(2, 3, height, width, seed=7, memory_format=LAYOUTS[layout])
    check_merged(x, 1, size, tap_spacing)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 37, 130])
def test_channels(channels, layout):
    x = random_tensor(2, channels, 3, 5, seed=8, memory_format=LAYOUTS[layout])
    check_merged(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, layout):
    x = random_tensor(3, 10, 5, 7, seed=9, dtype=dtype, memory_format=LAYOUTS[layout])
    check_merged(x, 3, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_combined(layout):
    x = random_tensor(2, 2, 29, 31, seed=10, memory_format=LAYOUTS[layout])
    with recorded(launch, run=True) as launches:
        check_merged(x)
    for name in ("mfdf_merged_kernel", "mfdf_taps_kernel"):
        for kernel_launch in launches_of(launches, name):
            assert kernel_launch.arguments["rows"] < 29
            assert kernel_launch.grid[1] > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_program_with_several_strips(layout, monkeypatch):
    monkeypatch.setattr(launch, "FILL", 0)
    monkeypatch.setattr(tiling, "FILL", 0)
    x = random_tensor(2, 3, 5, 17, seed=11, memory_format=LAYOUTS[layout])
    with recorded(launch, run=True) as launches:
        check_merged(x, 2, 3, 2)
    all_arguments = [kernel_launch.arguments for kernel_launch in launches]
    counts = [arguments["strips_per_program"] for arguments in all_arguments if "strips_per_program" in arguments]
    assert len(counts) == 3
    assert all(count > 1 for count in counts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_the_taps_is_computed_for_a_few_samples_at_a_time(layout, monkeypatch):
    monkeypatch.setattr(launch, "SCRATCH", 1)
    x = random_tensor(5, 3, 3, 2, seed=12, memory_format=LAYOUTS[layout])
    with recorded(launch, run=True) as launches:
        check_merged(x, 2, 5)
    assert len(launches_of(launches, "mfdf_taps_kernel")) == 5


@pytest.mark.parametrize(("layout", "dtype"), [("nhwc", torch.bfloat16), ("nchw", torch.float32)])
def test_many_turns_of_every_loop_of_the_convolution(layout, dtype, monkeypatch):
    def arguments(*shape, strips_per_program, branches=1, size=3):
        """Run the kernels with a strip for each column; return the arguments of each kernel's first and last launch."""
        _, _, height, width = shape
        cut = tiling.Strips(1, 1, 2, rows=height, across=width, strips=width, strips_per_program=strips_per_program)
        monkeypatch.setattr(launch, "cut_into_strips", lambda *_, **__: cut)
        with recorded(launch, run=True) as launches:
            check_merged(random_tensor(*shape, seed=14, dtype=dtype, memory_format=LAYOUTS[layout]), branches, size)
        first = {kernel_launch.name: kernel_launch.arguments for kernel_launch in reversed(launches)}
        last = {kernel_launch.name: kernel_launch.arguments for kernel_launch in launches}
        return first, last

    monkeypatch.setattr(launch, "block_rows", lambda *_: 1)
    first, _ = arguments(1, 2, 37, 3, branches=37, strips_per_program=1)
    forward, taps = first["mfdf_merged_kernel"], first["mfdf_taps_kernel"]
    assert min(forward["branches"], forward["rows"], taps["rows"]) > 32
    first, _ = arguments(1, 2, 3, 37, strips_per_program=37)
    assert min(first["mfdf_merged_kernel"]["strips_per_program"], first["mfdf_taps_kernel"]["strips_per_program"]) > 32
    _, last = arguments(37, 1, 1, 1, size=1, strips_per_program=1)
    over_samples = last["mfdf_contract_kernel"]
    _, last = arguments(2, 1, 1, 41, size=1, strips_per_program=1)
    over_parts = last["mfdf_contract_kernel"]
    assert min(over_samples["count"] / over_samples["BLOCK_B"], over_parts["parts"]) > 32

    monkeypatch.setattr(launch, "UNROLLED", 1)
    first, _ = arguments(1, 2, 2, 3, branches=37, strips_per_program=1)
    assert first["mfdf_merged_loop_kernel"]["branches"] > 32
    first, _ = arguments(1, 2, 2, 3, size=7, strips_per_program=1)
    assert first["mfdf_merged_loop_kernel"]["SIZE"] ** 2 > 32


def _without_last_tap(merged_taps):
    return lambda *args: (*merged_taps(*args)[:-1], merged_taps(*args)[-1] * 0)


def _without_border(load_row):
    return lambda ptr, column, width, *args: load_row(ptr, column, width - 1, *args)


def _without_last_row(strip_of):
    return lambda *args: (*strip_of(*args)[:3], strip_of(*args)[3] - 1, strip_of(*args)[4])


def _slightly_wrong(sum_of_lanes):
    return lambda *args: sum_of_lanes(*args) * 0.9999


@needs_interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("module", "name", "plant", "message"),
    [
        (convolution, "_merged_taps", _without_last_tap, "y: .* over the budget"),
        (convolution, "load_row", _without_border, "y: .* over the budget"),
        (convolution, "strip_of", _without_last_row, "y: error nan"),
        (taps, "_sum_of_lanes", _slightly_wrong, "dalpha: .* over the budget"),
    ],
)
def test_a_wrong_kernel_is_seen(module, name, plant, message, layout, monkeypatch):
    monkeypatch.setattr(module, name, plant(getattr(module, name)))
    with pytest.raises(AssertionError, match=message):
        check_merged(random_tensor(2, 3, 5, 7, memory_format=LAYOUTS[layout]))


@needs_interpreter
def test_an_unwritten_element_is_seen(monkeypatch):
    cut_into_strips = tiling.cut_into_strips

    def one_strip_less(*args, **kwargs):
        right = cut_into_strips(*args, **kwargs)
        return right._replace(strips=right.strips - 1)

    monkeypatch.setattr(launch, "cut_into_strips", one_strip_less)
    with pytest.raises(AssertionError, match="y: error nan"):
        check_merged(random_tensor(1, 2, 5, 23, memory_format=torch.channels_last))
