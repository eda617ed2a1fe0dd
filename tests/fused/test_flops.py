"""`torch.utils.flop_counter` counts what the operators do."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from kfde_layers import CFE, CSFE, MFDF, SFE
from kfde_layers.fused.mfdf import cpu
from kfde_layers.fused.mfdf.asked import Asked
from tests.support.inputs import draw

SHAPES = [(1, 64, 56, 56), (3, 6, 7, 5), (2, 8, 1, 1)]


def count(call, *args):
    with FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()


def with_backward(layer):
    return lambda x: layer(x).sum().backward()


def test_every_operator_has_a_formula():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kfde::")]
    composite = [
        name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    ]
    operators = {getattr(torch.ops.kfde, name.removeprefix("kfde::")) for name in set(names) - set(composite)}
    assert len(operators) == 6
    assert operators <= flop_registry.keys()  # the others are counted by what they call


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kernel_sizes", "dilation"), [((1, 3, 5, 7), 1), ((3, 3), (1, 2)), ((1,), 1)])
def test_the_reference_counts_branches_and_fc(shape, kernel_sizes, dilation):
    batch, channels, height, width = shape
    layer = MFDF(channels, kernel_sizes, dilation, impl="reference")
    taps = sum(size**2 for size in kernel_sizes)
    fc = channels * 32 + 32 * len(kernel_sizes) * channels
    expected = 2 * batch * (channels * height * width * taps + fc)
    assert count(layer, torch.zeros(shape)) == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("kernel_sizes", "dilation", "side"), [((1, 3, 5, 7), 1, 7), ((3, 3), (1, 2), 5), ((1,), 1, 1)]
)
def test_the_merged_form_counts_one_convolution_of_the_largest_kernel(shape, kernel_sizes, dilation, side):
    batch, channels = shape[:2]
    layer, x, branches = MFDF(channels, kernel_sizes, dilation, impl="fused"), torch.zeros(shape), len(kernel_sizes)
    fc = 2 * batch * (channels * 32 + 32 * branches * channels)
    mean, merging = 2 * x.numel(), 2 * batch * branches * channels * side**2
    assert count(layer, x) == 2 * x.numel() * side**2 + merging + mean + fc


def test_the_formulas_are_those_of_the_steps_on_cpu():
    """PyTorch counts the convolutions in these steps. It does not count the merging."""
    x, dy, alpha = draw(2, 6, 9, 8), draw(2, 6, 9, 8), draw(2, 3, 6)
    kernels, bias = draw(3, 6, 5, 5), draw(2, 6)
    convolution, merging = 2 * x.numel() * 25, 2 * alpha.numel() * 25
    assert count(cpu.merged_convolution, x, alpha, kernels, bias, 1) in (convolution, convolution + merging)
    assert count(torch.ops.kfde.merged_convolution, x, alpha, kernels, bias, 1) == convolution + merging
    steps = count(cpu.merged_convolution_backward, dy, x, alpha, kernels, 1, Asked())
    assert 2 * convolution <= steps <= 2 * convolution + merging
    backward = torch.ops.kfde.merged_convolution_backward
    for asked, expected in (
        (Asked(), 2 * convolution + 3 * merging),
        (Asked(alpha=False, kernels=False, bias=False), convolution + merging),
        (Asked(x=False), convolution + 2 * merging),
        (Asked(x=False, kernels=False), convolution + merging),
        (Asked(x=False, alpha=False, kernels=False), 0),
    ):
        assert count(backward, dy, x, alpha, kernels, 1, *asked) == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_of_the_merged_form_counts_every_gradient(shape):
    layer, x = MFDF(shape[1], impl="fused"), torch.zeros(shape, requires_grad=True)
    fc = 2 * shape[0] * (shape[1] * 32 + 32 * 4 * shape[1])
    merging = 2 * shape[0] * 4 * shape[1] * 49
    backward = count(with_backward(layer), x) - count(layer, x)
    assert backward == 2 * 2 * x.numel() * 49 + 3 * merging + 2 * 2 * x.numel() + 2 * fc


@pytest.mark.parametrize("make", [lambda **kw: CFE(6, **kw), SFE, lambda **kw: CSFE(6, **kw)])
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_gates_count_nothing_like_norms(make, impl):
    x = torch.zeros(2, 6, 9, 8, requires_grad=True)
    assert count(with_backward(make(impl=impl)), x) == 0
    assert count(with_backward(nn.BatchNorm2d(6)), x) == 0


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_counts_belong_to_the_layer_in_a_network(impl):
    network = nn.Sequential(nn.Conv2d(3, 6, 3), MFDF(6, impl=impl))
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 11, 10))
    counts = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    assert counts["Global"] == counts["Sequential.0"] + counts["Sequential.1"]
    assert counts["Sequential.1"] == count(network[1], torch.zeros(1, 6, 9, 8))
