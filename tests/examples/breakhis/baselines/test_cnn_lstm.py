import pytest
import timm
import torch
from torch import nn

from tests.support.baselines import make_small


@torch.no_grad()
def reads_channel_0(forget: float, **options) -> nn.Module:
    """Make a network of one hidden unit with c = share * c + tanh(channel 0), where the share is 1 or 0 for +-100."""
    model = make_small("cnn_lstm", hidden=1, **options)
    for name, parameter in model.lstm.named_parameters():
        parameter.zero_()
        if name.startswith("weight_ih"):
            parameter[2, 0] = 1.0  # gates are in the order input, forget, cell, output
        if name.startswith("bias_ih"):
            parameter.copy_(torch.tensor([100.0, forget, 0.0, 100.0]))
    return model


def make_map() -> torch.Tensor:
    """Make a map of 96 channels whose first one is 0.1 and 0.2 over 0.3 and 0.4."""
    x = torch.zeros(1, 96, 2, 2)
    x[0, 0] = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    return x


def tanh(*values: float) -> float:
    """Return tanh of the sum of the values' tanh."""
    return torch.tensor(values).tanh().sum().tanh().item()


@pytest.mark.parametrize(
    ("forget", "options", "expected"),
    [
        (-100.0, {}, [tanh(0.4)]),  # the last step is the lower right corner
        (-100.0, {"order": "rows"}, [tanh(0.35)]),  # the mean of the lower row
        (-100.0, {"bidirectional": True}, [tanh(0.4), tanh(0.1)]),  # backwards, the last step is the upper left corner
        (100.0, {}, [tanh(0.1, 0.2, 0.3, 0.4)]),  # no step is forgotten
        (100.0, {"order": "rows"}, [tanh(0.15, 0.35)]),
    ],
)
def test_the_state_by_hand(forget, options, expected):
    vector = reads_channel_0(forget, **options).describe(make_map())
    assert vector.shape == (1, 96 + len(expected))
    assert vector[0, 0].item() == pytest.approx(0.25)  # the mean of the map comes first
    assert vector[0, 96:].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("order", ["raster", "rows"])
def test_the_steps_are_the_positions_row_by_row(order):
    steps = make_small("cnn_lstm", order=order).steps(make_map())
    expected = {"raster": [0.1, 0.2, 0.3, 0.4], "rows": [0.15, 0.35]}[order]
    assert steps.shape == (1, len(expected), 96)
    assert steps[0, :, 0].tolist() == pytest.approx(expected)


def test_the_order_of_the_steps_changes_the_output():
    model, x = make_small("cnn_lstm"), torch.randn(2, 96, 3, 3)
    shuffled = x.flatten(2)[:, :, [4, 0, 8, 1, 7, 2, 6, 3, 5]].unflatten(2, (3, 3))
    assert (model.forward_head(x) - model.forward_head(shuffled)).abs().max() > 1e-4
    plain = timm.create_model("test_resnet", num_classes=3)
    torch.testing.assert_close(plain.forward_head(x), plain.forward_head(shuffled))


def test_without_the_lstm_it_is_the_backbone():
    model, images = make_small("cnn_lstm"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for parameter in model.lstm.parameters():
            parameter.zero_()
    backbone = timm.create_model("test_resnet", num_classes=3).eval()
    classifier = {"fc.weight": model.fc.weight[:, :96], "fc.bias": model.fc.bias}
    backbone.load_state_dict(model.trunk.state_dict() | classifier)
    torch.testing.assert_close(model(images), backbone(images), rtol=0, atol=1e-6)


def test_forget_gates_start_open():
    lstm = make_small("cnn_lstm", hidden=2, bidirectional=True).lstm
    for direction in ("", "_reverse"):
        biases = getattr(lstm, f"bias_ih_l0{direction}") + getattr(lstm, f"bias_hh_l0{direction}")
        assert biases.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
        assert getattr(lstm, f"weight_hh_l0{direction}").any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"bidirectional": "yes"}, "bidirectional must be one of False, True, got 'yes'"),
        ({"order": "columns"}, "order must be one of 'raster', 'rows', got 'columns'"),
        ({"backbone": "resnet5000"}, "backbone must be a model that timm knows, got 'resnet5000'"),
        ({"backbone": 50}, "backbone must be a model that timm knows, got 50"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("cnn_lstm_resnet50", **arguments)
