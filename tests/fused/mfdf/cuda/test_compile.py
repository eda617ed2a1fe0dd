import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kfde_layers.fused.mfdf.asked import Asked
from kfde_layers.fused.mfdf.cuda import launch
from tests.support.inputs import LAYOUTS
from tests.support.kernels import (
    LARGE,
    TARGETS,
    compile_launch,
    compiled_kernels,
    each_build,
    launches_of,
    needs_compiler,
    recorded,
    sass,
    the_launch_of,
)

pytestmark = [needs_compiler, pytest.mark.slow, pytest.mark.usefixtures("new_triton_cache")]

KERNELS = {
    "mfdf_coverage_kernel",
    "mfdf_mean_kernel",
    "mfdf_mean_backward_kernel",
    "mfdf_window_kernel",
    "mfdf_merged_kernel",
    "mfdf_taps_kernel",
    "mfdf_contract_kernel",
}


def launch_mfdf(shape, layout, dtype, branches=4, size=7, tap_spacing=1):
    """Call all four launchers on tensors without memory."""
    batch, channels = shape[:2]
    x = torch.empty(shape, device="meta", dtype=dtype, memory_format=LAYOUTS[layout])
    stacked_kernels = torch.empty((branches, channels, size, size), device="meta")
    alpha, p = torch.empty((batch, branches, channels), device="meta"), torch.empty((batch, channels), device="meta")
    launch.launch_mean(x, stacked_kernels[0], tap_spacing)
    launch.launch_mean_backward(p, x, stacked_kernels[0], tap_spacing, True, True)
    launch.launch_merged(x, alpha, stacked_kernels, p, tap_spacing)
    launch.launch_merged_backward(x, x, alpha, stacked_kernels, tap_spacing, Asked())


def loop_bodies(code):
    """Return the instructions of each loop: those between a jump backwards and its target."""
    instructions = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    bodies = []
    for address, text in instructions:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and (target := int(jump[1], 16)) < address:
            bodies.append([text for place, text in instructions if target <= place <= address])
    return bodies


@each_build
def test_nothing_spills(shape, layout, dtype, targets, tmp_path, record_property):
    rows = compiled_kernels(launch, lambda: launch_mfdf(shape, layout, dtype), tmp_path, targets)
    assert {row.target for row in rows} == {f"sm_{capability}" for capability in targets}
    assert {row.kernel for row in rows} == KERNELS
    for row in rows:
        record_property("resources", row._asdict())
        assert row.spills == 0, row
        assert row.registers <= 168, row  # so that twelve warps fit the 65536 of a multiprocessor
        assert row.shared <= 48 * 1024, row


@pytest.mark.parametrize(
    ("size", "tap_spacing", "layout", "dtype"),
    [  # sizes above 7 take another kernel: each of the two in each layout
        (1, 1, "nhwc", torch.bfloat16),
        (3, 2, "nchw", torch.float32),
        (5, 1, "nhwc", torch.bfloat16),
        (5, 1, "nchw", torch.float32),
        (9, 1, "nhwc", torch.bfloat16),
        (31, 1, "nchw", torch.float32),
        (31, 1, "nhwc", torch.bfloat16),
    ],
)
def test_nothing_spills_with_other_kernel_sizes(size, tap_spacing, layout, dtype, tmp_path):
    rows = compiled_kernels(
        launch, lambda: launch_mfdf(LARGE, layout, dtype, 2, size, tap_spacing), tmp_path, targets=(90,)
    )
    assert all(row.spills == 0 for row in rows), rows
    assert ("mfdf_merged_loop_kernel" in {row.kernel for row in rows}) == (size > 7)


@pytest.mark.parametrize(
    ("dtype", "capability"), [*((torch.bfloat16, capability) for capability in TARGETS), (torch.float32, 90)]
)
def test_the_mean_reads_and_writes_wide_vectors(dtype, capability, tmp_path):
    with recorded(launch) as launches:
        launch_mfdf(LARGE, "nhwc", dtype)
    forward, backward = (
        sass(compile_launch(the_launch_of(launches, name), capability), tmp_path)
        for name in ("mfdf_mean_kernel", "mfdf_mean_backward_kernel")
    )
    assert len(re.findall(r"\bLDG\.E\.128\b", forward)) >= 5  # four samples and their cover
    assert not re.findall(r"\bLDG\.E\.(?:64|U16)\b", forward)
    assert re.findall(r"\bLDGSTS\.E\.BYPASS\.128\b", backward)
    assert set(re.findall(r"\bSTG\.E(?:\.\w+)?", backward)) == {"STG.E.128"}


@pytest.mark.parametrize(("layout", "dtype"), [("nhwc", torch.bfloat16), ("nchw", torch.float32)])
def test_the_convolution_mostly_multiplies(layout, dtype, tmp_path):
    # Most instructions of the loop over the rows are the multiplications of the taps.
    with recorded(launch) as launches:
        launch_mfdf(LARGE, layout, dtype)
    for name in ("mfdf_merged_kernel", "mfdf_taps_kernel"):
        kernel_launch = launches_of(launches, name)[0]
        bodies = loop_bodies(sass(compile_launch(kernel_launch, 90), tmp_path))
        taps = 49 * kernel_launch.arguments["SEGMENT"]
        loops = [body for body in bodies if sum("FFMA" in instruction for instruction in body) == taps]
        assert loops
        assert min(map(len, loops)) < 1.75 * taps


@pytest.mark.parametrize(
    ("shape", "layout", "branches", "size"),
    [
        ((1, 2, 1, 1), "nhwc", 1, 1),
        ((1, 2, 1, 1), "nchw", 1, 9),
        ((2, 6, 4, 4), "nhwc", 1, 5),
        ((3, 34, 13, 11), "nchw", 3, 5),
    ],
)
def test_odd_sizes_compile(shape, layout, branches, size, tmp_path):
    # The compiler treats an argument that equals one as a constant. The interpreter does not.
    rows = compiled_kernels(
        launch, lambda: launch_mfdf(shape, layout, torch.float16, branches, size, 2), tmp_path, targets=(90,)
    )
    assert all(row.spills == 0 for row in rows), rows
