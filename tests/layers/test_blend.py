import torch
from torch import nn

from kfde_layers import CSFE
from kfde_layers.layers import Blend
from tests.support.inputs import draw


def test_zero_is_the_identity_and_one_the_block():
    block = CSFE(6)
    layer, x = Blend(block, 6), draw(2, 6, 5, 7, dtype=torch.float32)
    assert torch.equal(layer(x), x)
    nn.init.ones_(layer.blend)
    assert torch.equal(layer(x), block(x))
    nn.init.constant_(layer.blend, 0.25)
    torch.testing.assert_close(layer(x), x + 0.25 * (block(x) - x))
    layer.reset_parameters()
    assert torch.equal(layer(x), x)


def test_the_block_learns_from_the_second_step_on():
    layer, x = Blend(CSFE(6), 6), draw(2, 6, 5, 7, dtype=torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        gradients.append(layer.block.cfe.weight.grad.abs().max().item())
        assert layer.blend.grad.abs().min() > 0
        optimizer.step()
    assert gradients[0] == 0
    assert gradients[1] > 0


def test_blocks_that_follow_autocast():
    layer, x = Blend(nn.Conv2d(6, 6, 1), 6), draw(2, 6, 5, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.block(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), x)


def test_keys():
    assert list(Blend(CSFE(6), 6).state_dict()) == ["blend", "block.cfe.weight", "block.cfe.bias"]
