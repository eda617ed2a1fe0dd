"""Blocks in a model that merges all its modules itself, as Ultralytics' YOLO does."""

import pytest
import torch
from torch import nn

from kfde_layers import SFE, insert
from kfde_layers.testing import scatter_parameters
from tests.support.inputs import images


class ConvNorm(nn.Module):
    def __init__(self, channels, outputs):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.conv(x))


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(ConvNorm(3, 8), nn.ReLU(), ConvNorm(8, 4))

    def fuse(self, verbose=True):
        assert not verbose  # `insert` prints nothing
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.conv, module.norm = nn.utils.fuse_conv_bn_eval(module.conv, module.norm), nn.Identity()
        return self


class Silent(Network):
    def fuse(self):
        return super().fuse(verbose=False)


def make(network):
    torch.manual_seed(0)
    return scatter_parameters(network()).eval()


@pytest.mark.parametrize("network", [Network, Silent])
@pytest.mark.parametrize("point", ["0", "1", "2"])
@torch.no_grad()
def test_a_block_stays(network, point):
    model, x = insert(make(network), {point: SFE}, example_input=images(16)), images(16)
    assert all(isinstance(model[index].norm, nn.BatchNorm2d) for index in (0, 2))
    before = model(x)
    model.fuse(**({"verbose": False} if network is Network else {}))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [Network, Silent])
@pytest.mark.parametrize("point", ["0.conv", "0.norm"])
def test_a_block_that_would_be_lost_is_refused(network, point):
    model = make(network)
    with pytest.raises(ValueError, match=f"cannot insert at '{point}': the model merges this module into another"):
        insert(model, {point: SFE, "1": SFE}, example_input=images(16))
    assert not any("kfde" in key for key in model.state_dict())
