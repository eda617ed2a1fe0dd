"""Weights that a tool makes at each call, such as pruned ones; compared with calling each part in float64."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from kfde_layers import MFDF
from tests.support.agreement import count_operations
from tests.support.parts import (
    assert_calls_its_parts,
    changed,
    draw_map,
    each_mfdf,
    make_layer,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.(weight_norm|spectral_norm)` is deprecated:FutureWarning"
)


CHANGES = {
    "prune": lambda part: prune.l1_unstructured(part, "weight", 0.5),
    "pruned for good": lambda part: prune.remove(prune.random_unstructured(part, "weight", 0.5), "weight"),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
}


WITH_A_HOOK = ("prune", "weight_norm", "spectral_norm")


@pytest.mark.cell("Tools that change parts", "pruning, weight_norm, spectral_norm")
@pytest.mark.parametrize("change", CHANGES)
@each_mfdf
def test_tools_that_make_a_weight_anew_work_on_every_part(name, change):
    def change_every_part(layer):
        for part in [part for part in layer.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]:
            CHANGES[change](part)

    make = changed(name, change_every_part)
    assert_calls_its_parts(make)
    layer = make()
    optimizer = torch.optim.SGD(layer.train().parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(draw_map()).square().mean().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        optimizer.step()


@pytest.mark.parametrize("change", ["prune", "pruned for good"])
def test_pruning_of_the_gate_of_a_csfe(change):
    assert_calls_its_parts(changed("CSFE", lambda layer: CHANGES[change](layer.cfe)))


@pytest.mark.parametrize("change", CHANGES)
def test_fused_refuses_a_weight_that_a_hook_makes(change):
    layer = MFDF(8, impl="fused").double()
    CHANGES[change](layer.branches[2])
    CHANGES[change](layer.fc1)  # fc1 and fc2 are called in each implementation
    if change in WITH_A_HOOK:
        with pytest.raises(NotImplementedError, match=r"cannot run: branches\[2\] has a forward or backward hook"):
            layer(draw_map())
    else:
        assert count_operations(lambda: layer(draw_map()))["aten::conv2d"] == 1


class HalfWeight(nn.Module):
    """A parametrization that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return 0.5 * weight


@each_mfdf
def test_a_parametrization_runs_once_a_call(name):
    layer = make_layer(name)
    masks = [HalfWeight() for _ in layer.branches]
    for branch, mask in zip(layer.branches, masks, strict=True):
        parametrize.register_parametrization(getattr(branch, "conv", branch), "weight", mask, unsafe=True)
    for mode in (True, False):
        for mask in masks:
            mask.calls = 0
        layer.train(mode)(draw_map())
        assert [mask.calls for mask in masks] == [1] * len(masks)


class CountedNoise(nn.Module):
    """A parametrization that changes at each call, as spectral_norm does in training."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return (1 + 0.1 * self.calls) * weight


@pytest.mark.parametrize("hooked", [0, 3])
def test_a_parametrization_runs_once_when_another_branch_must_be_called(hooked):
    layer, counters = make_layer("MFDF"), [CountedNoise() for _ in range(4)]
    layer.branches[hooked].register_forward_hook(lambda *args: None)
    for branch, counter in zip(layer.branches, counters, strict=True):
        parametrize.register_parametrization(branch, "weight", counter, unsafe=True)
        counter.calls = 0
    layer(draw_map())
    assert [counter.calls for counter in counters] == [1, 1, 1, 1]
