"""The cost of asking, at each call, whether the parts are plain."""

import timeit

import pytest
import torch
from torch import nn

from kfde_layers import CSFE, MFDF

pytestmark = pytest.mark.slow


def shortest(call):
    """Return the time of the fastest of many calls, in seconds."""
    return min(timeit.repeat(call, number=1000, repeat=50)) / 1000


# Looking takes about 0.13 us a module: 2 us in MFDF, and 5 us in MFDF with batch norm, which has four times as many
# modules. Reading a submodule or a parameter as an attribute takes about 0.6 us.
@pytest.mark.parametrize("options", [{}, {"norm_layer": nn.BatchNorm2d}])
def test_mfdf_looks_faster_than_it_reads(options):
    layer = MFDF(64, **options).eval()
    branches = list(layer.branches)

    def read():
        for branch in layer.branches:
            for part in (branch.conv, branch.norm) if options else (branch,):
                _ = part.weight, part.bias

    assert layer._why_call(branches) is None
    assert shortest(lambda: layer._why_call(branches)) < shortest(read)


def test_csfe_looks_and_reads_faster_than_attributes_are_read():
    layer, x = CSFE(64), torch.zeros(1, 64, 1, 1)

    def read():
        _ = layer.cfe.weight, layer.cfe.bias

    assert layer._gamma_and_beta(x) == (layer.cfe.weight, layer.cfe.bias)
    assert shortest(lambda: layer._gamma_and_beta(x)) < shortest(read)
