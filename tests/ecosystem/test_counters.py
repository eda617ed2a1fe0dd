"""Counters of operations that are not PyTorch's own count what MFDF's parts do."""

import pytest
import timm
import torch
from torch import nn

from kfde_layers import CFE, CSFE, MFDF, SFE, insert

TABLE = "Counters and privacy"
SHAPE = (6, 9, 8)
PIXELS = 9 * 8

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning"),
]


def by_thop(module, x):
    thop = pytest.importorskip("thop", reason="thop is not installed")
    return thop.profile(module, (x,), verbose=False)[0]


def by_ptflops(module, x):
    ptflops = pytest.importorskip("ptflops", reason="ptflops is not installed")
    return ptflops.get_model_complexity_info(
        module, tuple(x.shape[1:]), print_per_layer_stat=False, as_strings=False, backend="pytorch"
    )[0]


def by_ptflops_of_operators(module, x):
    ptflops = pytest.importorskip("ptflops", reason="ptflops is not installed")
    return ptflops.get_model_complexity_info(
        module, tuple(x.shape[1:]), print_per_layer_stat=False, as_strings=False, backend="aten"
    )[0]


def by_fvcore(module, x):
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    counts = fvcore.FlopCountAnalysis(module, x)
    return counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


COUNTERS = {"thop": by_thop, "ptflops": by_ptflops, "fvcore": by_fvcore}
each_counter = pytest.mark.parametrize(
    "count", [pytest.param(count, marks=pytest.mark.cell(TABLE, name, "MFDF")) for name, count in COUNTERS.items()]
)


def macs(kernel_sizes=(1, 3, 5, 7), groups=6, channels=6, hidden=32):
    convolutions = PIXELS * channels * (channels // groups) * sum(size**2 for size in kernel_sizes)
    return convolutions + channels * hidden + hidden * len(kernel_sizes) * channels


@each_counter
@pytest.mark.parametrize(("kernel_sizes", "groups"), [((1, 3, 5, 7), 6), ((3,), 6), ((1, 3), 1)])
def test_parts_are_counted(count, kernel_sizes, groups):
    layer = MFDF(6, kernel_sizes, groups=groups).eval()
    # ptflops adds the biases, and one more per output of the convolutions
    largest = macs(kernel_sizes, groups) + 3 * len(kernel_sizes) * (6 * PIXELS + 6 + 32)
    assert macs(kernel_sizes, groups) <= count(layer, torch.zeros(1, *SHAPE)) <= largest


@each_counter
def test_a_layer_in_a_network_adds_its_own(count):
    torch.manual_seed(0)
    network = timm.create_model("test_convnext", num_classes=3).eval()
    x = torch.zeros(1, 3, 64, 64)
    bare = count(network, x)
    insert(network, {"stages.1": MFDF}, example_input=x)
    alone = count(MFDF(network.feature_info[1]["num_chs"]).eval(), torch.zeros(1, 32, 8, 8))
    assert count(network, x) - bare == pytest.approx(alone, rel=0.02)


@pytest.mark.parametrize("make", [CFE, lambda _: SFE(), CSFE])
@each_counter
def test_gates_need_no_more_than_a_few_operations_per_value(make, count):
    assert 0 <= count(make(6).eval(), torch.zeros(1, *SHAPE)) <= 20 * 6 * PIXELS


@pytest.mark.cell(TABLE, "ptflops", "MFDF")
def test_ptflops_of_operators_needs_the_reference():
    layer, x = MFDF(6, impl="reference").eval(), torch.zeros(1, *SHAPE)
    assert by_ptflops_of_operators(layer, x) >= macs()
    bare = nn.Conv2d(6, 6, 3, padding=1)
    assert by_ptflops_of_operators(bare, x) == pytest.approx(PIXELS * 36 * 9, rel=0.05)
