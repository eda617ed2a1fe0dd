"""Averages of a network's weights along its training."""

import pytest
import torch
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel

from tests.support.training import MODELS, SMALL, WITH_BATCH_NORM, batch, build, train

pytestmark = pytest.mark.slow

ROUNDING = {"rtol": 1e-12, "atol": 1e-14}
DECAY = 0.75
# Shares of the weights after each of three steps: "timm" starts from the first ones, "torch" takes the mean.
WEIGHTS = {"timm": (DECAY**2, DECAY * (1 - DECAY), 1 - DECAY), "torch": (1 / 3, 1 / 3, 1 / 3)}


def averaging(kind, model):
    return ModelEmaV3(model, decay=DECAY) if kind == "timm" else AveragedModel(model, use_buffers=True)


def update(average, model):
    average.update(model) if isinstance(average, ModelEmaV3) else average.update_parameters(model)


@pytest.mark.parametrize("kind", ["timm", "torch"])
@pytest.mark.parametrize("name", [*SMALL, *WITH_BATCH_NORM, *MODELS])
@pytest.mark.cell("Training engines", "EMA")
def test_an_averaged_network_is_the_average_by_hand(name, kind):
    images, labels = batch(name)
    model = build(name)
    average, states = None, []
    for _ in range(3):
        train(name, model, images, labels, steps=1)
        average = averaging(kind, model) if average is None else average
        update(average, model)
        states.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
    expected = {
        key: sum(weight * state[key] for weight, state in zip(WEIGHTS[kind], states, strict=True))
        for key, tensor in states[0].items()
        if tensor.is_floating_point()
    }
    averaged = average.module.state_dict()
    for key, tensor in expected.items():
        torch.testing.assert_close(averaged[key], tensor, **ROUNDING)
        assert not torch.equal(averaged[key], states[-1][key]), key  # it is not the last one
    loaded = build(name)
    loaded.load_state_dict(states[-1] | expected)  # the counters of batch norm have no mean
    torch.testing.assert_close(average.module.eval()(images), loaded.eval()(images), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(loaded(images), model.eval()(images), rtol=1e-3)
