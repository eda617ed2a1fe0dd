"""Blocks in a model that merges all its modules itself, as Ultralytics' YOLO does."""

import pytest
import torch
from torch import nn

from kfde_layers import SFE, insert
from kfde_layers.testing import scatter_parameters
from tests.support.inputs import images
from tests.support.networks import ConvNorm


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(ConvNorm(3, 8), nn.ReLU(), ConvNorm(8, 4))

    def fuse(self, verbose=True):
        assert not verbose  # `insert` prints nothing
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.conv, module.norm = nn.utils.fuse_conv_bn_eval(module.conv, module.norm), nn.Identity()
        return self


class InPlace(Network):
    """Keep each convolution, and a block after it, which then runs after the norm."""

    def fuse(self):
        for module in self.modules():
            if isinstance(module, ConvNorm):
                fused = nn.utils.fuse_conv_bn_eval(module.conv, module.norm)
                module.conv.weight, module.conv.bias, module.norm = fused.weight, fused.bias, nn.Identity()


each_network = pytest.mark.parametrize("network", [Network, InPlace])


@each_network
@pytest.mark.parametrize("point", ["0", "1", "2"])
@torch.no_grad()
def test_a_block_stays(network, point):
    torch.manual_seed(0)
    model, x = scatter_parameters(network()).eval(), images(16)
    variance = model[0].norm.running_var.clone()
    insert(model, {point: SFE}, example_input=x)
    assert torch.equal(model[0].norm.running_var, variance)  # not merged yet
    before = model(x)
    model.fuse(**({"verbose": False} if network is Network else {}))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@each_network
@pytest.mark.parametrize("part", ["conv", "norm"])
def test_a_block_that_would_be_lost_or_moved_is_refused(network, part):
    model = network()  # whose norms change nothing yet
    with pytest.raises(ValueError, match=f"cannot insert at '0.{part}': the model merges this module into another"):
        insert(model, {f"0.{part}": SFE, "1": SFE}, example_input=images(16))
    assert not any("kfde" in key for key in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_block_that_would_be_lost_is_refused_in_any_dtype(dtype):
    torch.manual_seed(0)
    model, x = scatter_parameters(Network()).eval().to(dtype), images(16).to(dtype)
    with pytest.raises(ValueError, match=r"cannot insert at '0\.norm': the model merges this module into another"):
        insert(model, {"0.norm": SFE}, example_input=x)
    insert(model, {"0": SFE}, example_input=x)


class Merged(ConvNorm):
    def reparameterize(self):
        self.conv, self.norm = nn.utils.fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()


class WithPart(nn.Module):
    """A network of which a part is called `fuse`, as those that fuse maps of several sizes have."""

    def __init__(self):
        super().__init__()
        self.body, self.fuse = Merged(3, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.fuse(self.body(x))


def test_a_part_that_is_called_fuse_is_no_method():
    torch.manual_seed(0)
    model = scatter_parameters(WithPart()).eval()
    with pytest.raises(ValueError, match=r"cannot insert at 'body\.norm': the model merges this module into another"):
        insert(model, {"body.norm": SFE}, example_input=images(16))
    insert(model, {"body": SFE, "fuse": SFE}, example_input=images(16))
