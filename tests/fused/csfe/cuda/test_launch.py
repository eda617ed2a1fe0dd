from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from kfde_layers.fused import maps
from kfde_layers.fused.csfe.cuda import backward, coefficients, forward, launch, small, statistics, tiling
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.testing import random_affine, random_tensor
from tests.support.csfe_kernels import OPERATORS, check, one_launch_for_each_step, run_kernels
from tests.support.guards import guarded_memory
from tests.support.inputs import LAYOUTS
from tests.support.kernels import (
    DEVICE,
    launches_of,
    needs_interpreter,
    recorded,
    runs_kernels,
    sigmoid_may_overflow,
    the_launch_of,
)

pytestmark = [*runs_kernels, sigmoid_may_overflow, pytest.mark.usefixtures("guards")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("correction", "scale"), [(0, 1.0), (1, 0.5)])
@pytest.mark.parametrize("threshold", [0.4, 0.5])
@pytest.mark.parametrize("operator", OPERATORS)
def test_equals_the_reference(operator, threshold, correction, scale, layout):
    if scale != 1.0 and operator != "csfe":
        scale = 1.0  # only a sum is ever scaled
    affine = random_affine(6, seed=1)  # few channels, so that gates at 0.4 close too
    x = 4 * random_tensor(3, 6, 5, 7, memory_format=LAYOUTS[layout])
    check(operator, x, 2, threshold=threshold, correction=correction, scale=scale, affine=affine)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_groups", [1, 2, 13, 26])
def test_groups(num_groups, layout):
    check("csfe", random_tensor(2, 26, 5, 7, seed=3, memory_format=LAYOUTS[layout]), num_groups)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 34, 1, 1), (2, 6, 1, 13), (2, 6, 4, 4), (1, 70, 3, 5)])
def test_odd_sizes(shape, layout):
    for operator in OPERATORS:
        check(operator, random_tensor(*shape, seed=4, memory_format=LAYOUTS[layout]), 2 if shape[1] > 2 else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 17])
def test_sfe_takes_an_odd_number_of_channels(channels, layout):
    check("sfe", random_tensor(2, channels, 5, 7, seed=4, memory_format=LAYOUTS[layout]))


@pytest.mark.parametrize(("layout", "height"), [("nchw", 61), ("nhwc", 29)])  # px; chunks are shorter in "nhwc"
def test_chunks_of_positions_are_combined(layout, height):
    x = random_tensor(1, 6, height, 67, seed=5, memory_format=LAYOUTS[layout], device=DEVICE)
    with recorded(launch, run=True) as launches:
        check("csfe", x, 3, ways=["steps"])
    assert all(the_launch_of(launches, name).grid[1] > 2 for name in ("csfe_statistics_kernel", "csfe_sums_kernel"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_turns_of_every_loop(layout, dtype, monkeypatch):
    positions, channels, chunk = 11 * 13, 74, 4
    monkeypatch.setattr(launch, "BLOCK", 1)
    monkeypatch.setattr(launch, "cut_into_groups", lambda *_: tiling.Groups(2, 37, 1, 64, block_sum=1))
    monkeypatch.setattr(launch, "part_block", lambda *_: 1)
    monkeypatch.setattr(tiling, "cut_into_tiles", lambda *_: tiling.Tiling(1, 64, chunk, -(-positions // chunk)))
    x = random_tensor(1, channels, 11, 13, seed=6, dtype=dtype, memory_format=LAYOUTS[layout], device=DEVICE)
    with recorded(launch, run=True) as launches:
        check("csfe", x, 2, ways=["steps"])
    for kernel_launch in launches:
        arguments = kernel_launch.arguments
        if "BLOCK_HW" in arguments:
            assert arguments["chunk"] / arguments["BLOCK_HW"] == chunk
        if "BLOCK_SUM" in arguments:
            assert arguments["C"] / arguments["BLOCK_SUM"] > 32
    assert {turns(kernel_launch) for kernel_launch in launches_of(launches, "csfe_coefficients_kernel")} == {1, 36}
    assert turns(the_launch_of(launches, "csfe_moment_gradients_kernel")) == 36
    parameters = the_launch_of(launches, "csfe_parameters_kernel").arguments
    assert parameters["C"] / parameters["BLOCK"] > 32


def turns(kernel_launch):
    """Return how many blocks of parts a program reads."""
    return kernel_launch.arguments["parts"] / kernel_launch.arguments["BLOCK_PARTS"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_turns_of_the_loop_over_positions(layout, monkeypatch):
    monkeypatch.setattr(tiling, "cut_into_tiles", lambda *_: tiling.Tiling(4, 64, 144, 1))
    x = random_tensor(1, 74, 11, 13, seed=6, memory_format=LAYOUTS[layout], device=DEVICE)
    check("csfe", x, 2, ways=["steps"])


@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs_that_are_not_dense(operator):
    rows = random_tensor(3, 6, 10, 9, seed=9)[:, :, ::2, 1:8]
    channels = random_tensor(3, 9, 5, 7, seed=9, memory_format=torch.channels_last)[:, :6]
    samples = random_tensor(6, 6, 5, 7, seed=9)[::2]
    dense_dy = random_tensor(3, 6, 5, 7, seed=10, memory_format=torch.channels_last)
    for x in (rows, channels, samples):
        check(operator, x, 3, dy=dense_dy)
        check(operator, x, 3, dy=torch.tensor(0.7).expand(3, 6, 5, 7))


def test_parameters_that_are_not_dense():
    weight, bias = torch.stack(random_affine(6), dim=1).unbind(1)
    assert not weight.is_contiguous()
    check("csfe", random_tensor(2, 6, 5, 7), 3, affine=(weight, bias))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_empty_batch(operator, layout):
    x = random_tensor(0, 6, 5, 7, memory_format=LAYOUTS[layout], device=DEVICE)
    weight, bias = random_affine(6, device=DEVICE)
    with recorded(launch) as launches:
        y, dx, *parameter_gradients = run_kernels(operator, x, x, weight, bias, 3, 0.5, 0, 1.0)
    assert not launches
    assert y.shape == dx.shape == x.shape
    assert all(torch.equal(gradient, torch.zeros(6, device=DEVICE)) for gradient in parameter_gradients)
    assert len(parameter_gradients) == (0 if operator == "sfe" else 2)


def test_same_bits_every_time():
    x = random_tensor(1, 6, 61, 67, seed=12, device=DEVICE)
    weight, bias = random_affine(6, device=DEVICE)
    first, second = (run_kernels("csfe", x, x, weight, bias, 3, 0.5, 0, 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [((2, 34, 7, 7), 2), ((1, 12, 8, 8), 12), ((3, 40, 3, 2), 4), ((1, 256, 8, 8), 2), ((1, 280, 1, 3), 20)],
)
def test_small_maps_in_one_launch(shape, num_groups, layout):
    x = random_tensor(*shape, seed=4, memory_format=LAYOUTS[layout])
    with recorded(launch, run=True) as launches:
        check("csfe", x, num_groups, threshold=0.45, correction=1, scale=0.5, ways=["as in use"])
    assert {kernel_launch.name for kernel_launch in launches} == {f"csfe_{name}_kernel" for name in ONE_LAUNCH}


STEPS = ["statistics", "coefficients", "forward", "coefficients", "sums", "moment_gradients", "backward", "parameters"]
ONE_LAUNCH = ["small_forward", "small_backward", "parameters"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "num_groups", "expected"),
    [
        ((32, 768, 7, 7), 16, ONE_LAUNCH),
        ((1, 320, 8, 8), 16, ONE_LAUNCH),
        ((256, 2048, 7, 7), 16, ONE_LAUNCH),
        ((1, 320, 8, 9), 16, STEPS),  # more than 64 positions
        ((32, 768, 7, 7), 3, STEPS),  # groups that exchange with parts of two others
        ((32, 768, 7, 7), 4, STEPS),  # groups of 192 channels
        ((2, 256, 7, 7), 2, ONE_LAUNCH),  # groups of 128 channels
        ((2, 258, 7, 7), 2, STEPS),  # groups of 129 channels
        ((64, 96, 56, 56), 16, STEPS),
        ((1, 96, 512, 512), 16, STEPS),
    ],
)
def test_the_launches(shape, num_groups, expected, layout):
    x = torch.empty(shape, device="meta", memory_format=LAYOUTS[layout])
    parameter = torch.empty(shape[1], device="meta")
    options = CsfeOptions(num_groups, with_sfe=True)
    with recorded(launch) as launches:
        _, mean, m2 = launch.launch_forward(x, parameter, parameter, options)
        launch.launch_backward(x, x, parameter, parameter, mean, m2, options, True, True)
    assert [kernel_launch.name.removeprefix("csfe_").removesuffix("_kernel") for kernel_launch in launches] == expected


@triton.jit
def _address_kernel(out_ptr, n, c, p, hw, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # noqa: N803
    tl.store(out_ptr, maps.address(n, c, 0, p, 1, hw, C, CHANNELS_LAST))


def test_addresses_of_positions_can_pass_32_bits():
    n, c, p, hw, channels = 500_000, 5, 11, 4087, 6
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _address_kernel[(1,)](out, n, c, p, hw, channels, False)
    assert int(out) == (n * channels + c) * hw + p > 2**33
    _address_kernel[(1,)](out, n, c, p, hw, channels, True)
    assert int(out) == (n * hw + p) * channels + c


def test_new_memory_is_nan_and_guarded():
    assert torch.empty_like(torch.zeros(3)).isnan().all()
    assert torch.zeros(3).new_empty(3).isnan().all()


@pytest.mark.parametrize("index", [-1, 3])
def test_a_write_outside_of_a_tensor_is_seen(index):
    def write():
        with guarded_memory():
            tensor = torch.zeros(3).new_empty(3)
            tensor.as_strided((1,), (1,), tensor.storage_offset() + index).zero_()

    with pytest.raises(AssertionError, match="1 elements were written outside of a tensor"):
        write()


def _without_spread_of_means(combine_moments):
    return lambda mean, mean_low, m2, count: (*combine_moments(mean, mean_low, m2, count)[:2], m2.sum(0))


def _shifted_partner(address):
    return lambda n, c, *args: address(n, c - (c >= args[4] // 2).to(tl.int32), *args)


def _without_constant(load):
    return lambda *args: (load(*args)[0], load(*args)[1] * 0)


def _without_mean_offset(group_moments):
    return lambda *args: (group_moments(*args)[0] * 0, group_moments(*args)[1])


def _wrong_spatial_slope(results):
    return lambda half1, *args: results((*half1[:4], half1[4] * 0.99), *args)


@needs_interpreter
@pytest.mark.parametrize(
    ("module", "name", "plant"),
    [
        (statistics, "combine_moments", _without_spread_of_means),
        (forward, "address", _shifted_partner),
        (backward, "_load_moment_gradients", _without_constant),
        (coefficients, "_group_moments", _without_mean_offset),
        (forward, "results", _wrong_spatial_slope),
        (small, "results", _wrong_spatial_slope),
    ],
)
def test_a_wrong_kernel_is_seen(module, name, plant, monkeypatch):
    monkeypatch.setattr(module, name, plant(getattr(module, name)))
    with pytest.raises(AssertionError, match="is over the budget"):
        check("csfe", random_tensor(3, 8, 5, 7), 2)


@needs_interpreter
def test_an_unwritten_element_is_seen(monkeypatch):
    cut_into_tiles = tiling.cut_into_tiles

    def one_chunk_less(*args):
        right = cut_into_tiles(*args)
        return right._replace(chunks=right.chunks - 1) if right.chunks > 1 else right

    monkeypatch.setattr(tiling, "cut_into_tiles", one_chunk_less)
    with pytest.raises(AssertionError, match="error nan"):
        check("cfe", random_tensor(1, 2, 23, 29), 1)


@pytest.mark.parametrize("side", [7, 9])  # px: in one launch, and in steps
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("with_x", "with_parameters"), [(False, True), (True, False)])
def test_only_the_gradients_that_are_asked_for(operator, with_x, with_parameters, side):
    x = random_tensor(2, 10, side, side, device=DEVICE)
    weight, bias = (parameter.to(DEVICE) for parameter in random_affine(10, seed=1))
    parameters = (None, None) if operator == "sfe" else (weight, bias)
    options = CsfeOptions(2, with_sfe=operator != "cfe")
    dy = random_tensor(2, 10, side, side, seed=2, device=DEVICE)
    _, mean, m2 = launch.launch_forward(x, *parameters, options)
    everything = launch.launch_backward(dy, x, *parameters, mean, m2, options, True, True)
    some = launch.launch_backward(dy, x, *parameters, mean, m2, options, with_x, with_parameters)
    wanted = (with_x, *[with_parameters and operator != "sfe"] * 2)
    for asked, gradient, expected in zip(wanted, some, everything, strict=True):
        if asked:
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
        else:
            assert gradient is None


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("way", ["as in use", "steps"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_exchange_a_nan_stays_in_its_channel(layout, way):
    x = random_tensor(2, 6, 5, 7, memory_format=LAYOUTS[layout], device=DEVICE)
    dy = random_tensor(2, 6, 5, 7, seed=2, memory_format=LAYOUTS[layout], device=DEVICE)
    x[0, 4, 3, 2] = torch.nan
    dy[1, 2, 0, 0] = torch.inf
    with one_launch_for_each_step() if way == "steps" else nullcontext():
        results = run_kernels("sfe", dy, x, x, x, 1, 0.5, 0, 1.0)
    for result, reached in zip(results, ({(0, 4)}, {(0, 4), (1, 2)}), strict=True):
        assert {tuple(index) for index in (~result.isfinite()).any(3).any(2).nonzero().tolist()} == reached


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["as in use", "steps"])
def test_an_outlier_first_in_every_row_of_a_tile(layout, way, monkeypatch):
    """The sums of a lane that starts there must not cancel."""
    monkeypatch.setattr(tiling, "cut_into_tiles", lambda *_: tiling.Tiling(1, 64, 400, 1))
    side = 8 if way == "as in use" else 20
    x = 1e-2 * random_tensor(1, 8, side, side, memory_format=LAYOUTS[layout], device=DEVICE)
    x[:, :, 0] += 1.2345678
    check("csfe", x, 2, ways=[way])
