import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from kfde_layers.fused import maps
from kfde_layers.fused.mfdf.cuda import convolution, launch, mean, taps, tiling
from kfde_layers.fused.mfdf.merging import convolve_each, mean_by_coverage, merge_kernels
from kfde_layers.ops.formats import as_input, upcast
from kfde_layers.testing import assert_error_budget, random_tensor
from tests.support.agreement import with_gradients
from tests.support.inputs import LAYOUTS
from tests.support.kernels import (
    DEVICE,
    launches_of,
    needs_interpreter,
    recorded,
    runs_kernels,
    the_launch_of,
)

RESULTS = ("p", "dx of the mean", "dkernel", "y", "dx", "dalpha", "dstacked", "dbias")

pytestmark = [*runs_kernels, pytest.mark.usefixtures("guards")]


def draw(*shape: int, seed: int) -> Tensor:
    return random_tensor(*shape, seed=seed, device=DEVICE)


def run_mean_reference(dp: Tensor, x: Tensor, kernel: Tensor, tap_spacing: int) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in (x, kernel)]
    p = mean_by_coverage(upcast(inputs[0]), inputs[1], tap_spacing)
    return with_gradients(p, inputs, dp)


def run_merged_reference(
    dy: Tensor, x: Tensor, alpha: Tensor, stacked_kernels: Tensor, bias: Tensor, tap_spacing: int
) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in (x, alpha, stacked_kernels, bias)]
    merged_kernels = merge_kernels(inputs[1], inputs[2])
    y = as_input(convolve_each(upcast(inputs[0]), merged_kernels, inputs[3], tap_spacing), x)
    return with_gradients(y, inputs, dy)


def run_mean(dp: Tensor, x: Tensor, kernel: Tensor, tap_spacing: int) -> list[Tensor]:
    return [launch.launch_mean(x, kernel, tap_spacing), *launch.launch_mean_backward(dp, x, kernel, tap_spacing)]


def run_merged(
    dy: Tensor, x: Tensor, alpha: Tensor, stacked_kernels: Tensor, bias: Tensor, tap_spacing: int
) -> list[Tensor]:
    y = launch.launch_merged(x, alpha, stacked_kernels, bias, tap_spacing)
    return [y, *launch.launch_merged_backward(dy, x, alpha, stacked_kernels, tap_spacing)]


def assert_within_budget(
    names: tuple[str, ...], run, run_reference, inputs: tuple[Tensor, ...], tap_spacing: int
) -> None:
    """Judge the result and every gradient by the reference's error on the same inputs."""
    actual, reference = run(*inputs, tap_spacing), run_reference(*inputs, tap_spacing)
    exact = run_reference(*(tensor.double() for tensor in inputs), tap_spacing)
    assert len(actual) == len(exact) == len(names)
    for name, *results in zip(names, actual, reference, exact, strict=True):
        assert_error_budget(*results, name=name)
        if results[0].shape == inputs[1].shape and name in ("y", "dx", "dx of the mean"):
            layout = torch.channels_last if inputs[1].stride(1) == 1 else torch.contiguous_format
            assert results[0].is_contiguous(memory_format=layout), name
        else:
            assert results[0].is_contiguous(), name


def check_mean(x: Tensor, size: int = 3, tap_spacing: int = 1) -> None:
    x = x.to(DEVICE)
    inputs = (draw(*x.shape[:2], seed=1), x, draw(x.shape[1], size, size, seed=2))
    assert_within_budget(RESULTS[:3], run_mean, run_mean_reference, inputs, tap_spacing)


def check_merged(x: Tensor, branches: int = 2, size: int = 3, tap_spacing: int = 1) -> None:
    x = x.to(DEVICE)
    dy = torch.empty_like(x).copy_(random_tensor(*x.shape, seed=3))
    alpha, stacked_kernels = (
        draw(x.shape[0], branches, x.shape[1], seed=4),
        draw(branches, x.shape[1], size, size, seed=5),
    )
    assert_within_budget(
        RESULTS[3:],
        run_merged,
        run_merged_reference,
        (dy, x, alpha, stacked_kernels, draw(*x.shape[:2], seed=6)),
        tap_spacing,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("branches", "size", "tap_spacing"),
    [(1, 1, 1), (2, 3, 1), (3, 7, 1), (4, 9, 1), (2, 5, 2), (1, 3, 3), (3, 1, 2), (2, 9, 2)],
)
def test_equals_the_reference(branches, size, tap_spacing, layout):
    x = random_tensor(2, 5, 7, 11, memory_format=LAYOUTS[layout])
    check_mean(x, size, tap_spacing)
    check_merged(x, branches, size, tap_spacing)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("height", "width", "size", "tap_spacing"),
    [(1, 1, 7, 1), (1, 1, 9, 3), (1, 5, 7, 2), (3, 2, 7, 1), (3, 2, 9, 1), (6, 7, 7, 3)],
)
def test_maps_smaller_than_the_kernel(height, width, size, tap_spacing, layout):
    x = random_tensor(2, 3, height, width, seed=7, memory_format=LAYOUTS[layout])
    check_mean(x, size, tap_spacing)
    check_merged(x, 1, size, tap_spacing)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 37, 130])
def test_channels(channels, layout):
    x = random_tensor(2, channels, 3, 5, seed=8, memory_format=LAYOUTS[layout])
    check_mean(x)
    check_merged(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, layout):
    x = random_tensor(3, 10, 5, 7, seed=9, dtype=dtype, memory_format=LAYOUTS[layout])
    check_mean(x, 5)
    check_merged(x, 3, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_combined(layout, monkeypatch):
    monkeypatch.setattr(launch, "SAMPLES", 1)
    x = random_tensor(2, 2, 29, 31, seed=10, memory_format=LAYOUTS[layout])
    with recorded(launch, run=True) as launches:
        check_mean(x)
        check_merged(x)
    assert the_launch_of(launches, "mfdf_mean_kernel").grid[1] > 1  # chunks of positions
    assert the_launch_of(launches, "mfdf_mean_backward_kernel").grid[1] > 1  # parts of the samples
    assert launches_of(launches, "mfdf_window_kernel")[-1].arguments["scale"] != 1
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


def _without_far_side(first_last_tap):
    return lambda *args: (first_last_tap(*args)[0] * 0, first_last_tap(*args)[1])


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
    ("module", "name", "plant", "check", "message"),
    [
        (mean, "_first_last_tap", _without_far_side, check_mean, "p: .* over the budget"),
        (mean, "_border_class", lambda _: lambda position, *_: position * 0 + 1, check_mean, "p: .* over the budget"),
        (convolution, "_merged_taps", _without_last_tap, check_merged, "y: .* over the budget"),
        (convolution, "load_row", _without_border, check_merged, "y: .* over the budget"),
        (convolution, "strip_of", _without_last_row, check_merged, "y: error nan"),
        (taps, "_sum_of_lanes", _slightly_wrong, check_merged, "dalpha: .* over the budget"),
    ],
)
def test_a_wrong_kernel_is_seen(module, name, plant, check, message, layout, monkeypatch):
    monkeypatch.setattr(module, name, plant(getattr(module, name)))
    with pytest.raises(AssertionError, match=message):
        check(random_tensor(2, 3, 5, 7, memory_format=LAYOUTS[layout]))


@needs_interpreter
def test_an_unwritten_element_is_seen(monkeypatch):
    cut_into_strips = tiling.cut_into_strips

    def one_strip_less(*args, **kwargs):
        right = cut_into_strips(*args, **kwargs)
        return right._replace(strips=right.strips - 1)

    monkeypatch.setattr(launch, "cut_into_strips", one_strip_less)
    with pytest.raises(AssertionError, match="y: error nan"):
        check_merged(random_tensor(1, 2, 5, 23, memory_format=torch.channels_last))
