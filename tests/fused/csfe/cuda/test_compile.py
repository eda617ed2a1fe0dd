import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kfde_layers.fused.csfe.cuda import launch
from kfde_layers.fused.csfe.options import CsfeOptions
from tests.support.inputs import LAYOUTS
from tests.support.kernels import (
    LARGE,
    SMALL,
    TARGETS,
    compile_launch,
    compiled_kernels,
    each_build,
    needs_compiler,
    recorded,
    resources,
    sass,
    the_launch_of,
)

pytestmark = [needs_compiler, pytest.mark.slow, pytest.mark.usefixtures("new_triton_cache")]

# Bits of each load and store, for a channels_last map of 16-bit numbers.
WIDEST = {"csfe_statistics_kernel": 128, "csfe_forward_kernel": 128, "csfe_sums_kernel": 64, "csfe_backward_kernel": 64}
STEPS = {*WIDEST, "csfe_coefficients_kernel", "csfe_moment_gradients_kernel", "csfe_parameters_kernel"}
ONE_LAUNCH = {"csfe_small_forward_kernel", "csfe_small_backward_kernel", "csfe_parameters_kernel"}


def launch_csfe(shape, layout, dtype, num_groups=16, operator="csfe"):
    """Call both launchers on tensors without memory."""
    x = torch.empty(shape, device="meta", dtype=dtype, memory_format=LAYOUTS[layout])
    parameter = None if operator == "sfe" else torch.empty(shape[1], device="meta")
    options = CsfeOptions(num_groups, with_sfe=operator != "cfe")
    y, mean, m2 = launch.launch_forward(x, parameter, parameter, options)
    launch.launch_backward(y, x, parameter, parameter, mean, m2, options, True, True)


def access_bits(compiled, folder):
    """Return the bits of each kind of access to global memory. LDGSTS are the loads of a map, which are pipelined."""
    widths = {"LDGSTS": set(), "STG": set()}
    for kind, suffixes in re.findall(r"\b(LDGSTS|STG)\.E((?:\.[A-Z0-9]+)*)", sass(compiled, folder)):
        bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", suffixes)
        widths[kind].add(int(bits[1]) if bits else 32)
    return widths


@each_build
def test_nothing_spills(shape, layout, dtype, targets, tmp_path, record_property):
    rows = compiled_kernels(launch, lambda: launch_csfe(shape, layout, dtype), tmp_path, targets)
    assert {row.target for row in rows} == {f"sm_{capability}" for capability in targets}
    assert {row.kernel for row in rows} == (ONE_LAUNCH if shape == SMALL else STEPS)
    for row in rows:
        record_property("resources", row._asdict())
        assert row.spills == 0, row
        assert row.registers <= 168, row  # so that three programs of 128 threads fit the 65536 of a multiprocessor
        assert row.shared <= 48 * 1024, row


@pytest.mark.parametrize(
    ("operator", "num_groups", "layout", "dtype"),
    [
        ("cfe", 16, "nhwc", torch.bfloat16),
        ("cfe", 16, "nchw", torch.float32),
        ("sfe", 16, "nhwc", torch.float32),
        ("csfe", 1, "nchw", torch.bfloat16),
        ("csfe", 96, "nhwc", torch.float32),
    ],
)
def test_nothing_spills_in_cfe_or_sfe_and_with_other_groups(operator, num_groups, layout, dtype, tmp_path):
    rows = compiled_kernels(
        launch, lambda: launch_csfe(LARGE, layout, dtype, num_groups, operator), tmp_path, targets=(90,)
    )
    assert all(row.spills == 0 for row in rows), rows
    assert ("csfe_parameters_kernel" in {row.kernel for row in rows}) == (operator != "sfe")


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "capability"),
    [
        *((LARGE, "nhwc", torch.bfloat16, capability) for capability in TARGETS),
        *((LARGE, "nchw", torch.float32, capability) for capability in TARGETS),
        (LARGE, "nchw", torch.bfloat16, 90),
        ((64, 384, 14, 14), "nhwc", torch.bfloat16, 90),
        ((64, 384, 14, 14), "nchw", torch.bfloat16, 90),
    ],
)
def test_maps_are_read_and_written_in_wide_vectors(shape, layout, dtype, capability, tmp_path):
    with recorded(launch) as launches:
        launch_csfe(shape, layout, dtype)
    launches_on_maps = [map_launch for map_launch in launches if map_launch.name in WIDEST]
    assert len(launches_on_maps) == 4
    for map_launch in launches_on_maps:
        expected_bits = WIDEST[map_launch.name]
        if layout == "nchw" and (map_launch.name != "csfe_statistics_kernel" or shape[2] % 8):
            expected_bits = 32 * dtype.itemsize  # four numbers
        bits = access_bits(compile_launch(map_launch, capability), tmp_path)
        assert bits["LDGSTS"] == {expected_bits}, map_launch.name
        if "y_ptr" in map_launch.arguments or "dx_ptr" in map_launch.arguments:
            assert bits["STG"] == {expected_bits}, map_launch.name


@pytest.mark.parametrize("operator", ["cfe", "sfe", "csfe"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((1, 4, 1, 1), "nhwc"), ((3, 8, 4, 4), "nchw"), ((2, 40, 7, 7), "nhwc")],
)
def test_small_maps_of_odd_sizes_compile(shape, layout, operator, tmp_path):
    launch_small = lambda: launch_csfe(shape, layout, torch.float16, 2, operator)  # noqa: E731
    rows = compiled_kernels(launch, launch_small, tmp_path, targets=(90,))
    assert {row.kernel for row in rows} == ONE_LAUNCH - ({"csfe_parameters_kernel"} if operator == "sfe" else set())
    assert all(row.spills == 0 for row in rows), rows


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((1, 2, 1, 1), "nhwc"), ((1, 2, 1, 1), "nchw"), ((2, 6, 4, 4), "nhwc"), ((3, 34, 13, 11), "nchw")],
)
def test_odd_sizes_compile(shape, layout, tmp_path):
    # The compiler treats an argument that equals one as a constant. The interpreter does not.
    rows = compiled_kernels(launch, lambda: launch_csfe(shape, layout, torch.float16, 1), tmp_path, targets=(90,))
    assert all(row.spills == 0 for row in rows), rows


def test_a_spill_is_seen(monkeypatch, tmp_path):
    with recorded(launch) as launches:
        launch_csfe(LARGE, "nhwc", torch.bfloat16)
    backward = the_launch_of(launches, "csfe_backward_kernel")
    tight = backward._replace(options=backward.options | {"maxnreg": 32})
    assert resources(compile_launch(tight, 90), tmp_path).spills > 0
