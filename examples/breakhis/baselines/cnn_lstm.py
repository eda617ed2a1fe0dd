"""A CNN whose feature map is read by an LSTM: the timm model `cnn_lstm_resnet50`."""

from typing import Any

import torch
from timm.models import DefaultCfg, register_model
from torch import Tensor, nn

from breakhis.baselines.checks import check_choice, check_int
from breakhis.baselines.trunk import TrunkNetwork, build_on_trunk, make_trunk, resnet_cfgs

__all__ = ["CnnLstm"]  # register_model adds the factory


class CnnLstm(TrunkNetwork):
    r"""A hybrid of CNN and LSTM: the mean of the feature map, and the last state of an LSTM that reads its positions.

    \[ \text{logits} = W\, \big(\mathrm{mean}_{hw} f(x) \,\|\, h_T\big) + b, \qquad
       h_t = \mathrm{LSTM}(s_t, h_{t-1}) \]

    with f the trunk, s_1 ... s_T the positions of its map row by row, and `||` the concatenation. An image of 224 x 224
    px has 7 x 7 = 49 steps of 2048 channels.

    Source: Srikantamurthy et al. (2023), BMC Medical Imaging 23: 19, doi 10.1186/s12880-023-00964-0.

    Fidelity: in the spirit of the paper. Known is only what its abstract and other papers say of it: a CNN with
    ImageNet weights, an LSTM, and features that are concatenated.
    Unknown: the CNN, what the sequence is, the number of units, the learning rate, the split, and whether one model
    tells eight classes apart or two models four each. The network here is the plainest that fits. Its trunk is
    ResNet-50, so that its difference from ResNet-50 is the LSTM alone.

    Args:
        backbone: A timm model whose last feature map is (B, C, h, w). If its own head holds more than a linear
            classifier, as in VGG, that part stays unused.
        hidden: Units of the LSTM in each direction.
        bidirectional: Whether a second LSTM reads the steps backwards.
        order: "raster": a step for each position, row by row; "rows": a step for the mean of each row.
        in_chans: Channels of the image.
        num_classes: Number of classes; 0: no classifier.
        global_pool: How the map is pooled besides the LSTM: "avg", "max" or "avgmax"; "": no pooling and no LSTM.
        drop_rate: Dropout before the classifier.

    Raises:
        TypeError: A count is not an integer.
        ValueError: An argument is outside its range.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        *,
        hidden: int = 256,
        bidirectional: bool = False,
        order: str = "raster",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.5,
    ) -> None:
        check_int("hidden", hidden, minimum=1)
        check_choice("bidirectional", bidirectional, (False, True))
        check_choice("order", order, ("raster", "rows"))
        trunk = make_trunk(backbone, in_chans)
        super().__init__(trunk, trunk.num_features + hidden * (1 + bidirectional), drop_rate)
        self.order = order
        self.lstm = nn.LSTM(self.num_features, hidden, batch_first=True, bidirectional=bidirectional)
        _open_forget_gates(self.lstm)
        self.dropout = nn.Dropout(self.drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def steps(self, x: Tensor) -> Tensor:
        """Return the sequence of a map, (B, C, h, w): (B, h * w, C), or (B, h, C) with `order="rows"`."""
        x = x.flatten(2) if self.order == "raster" else x.mean(3)
        return x.mT

    def describe(self, x: Tensor) -> Tensor:
        """Turn the feature map, (B, C, h, w), into (B, C + hidden), with two directions (B, C + 2 hidden)."""
        _, (last, _) = self.lstm(self.steps(x))
        return self.dropout(torch.cat([self.global_pool(x), *last], dim=1))


def _open_forget_gates(lstm: nn.LSTM) -> None:
    """Set the biases of the forget gates to 1 and the others to 0, so that early steps are not forgotten at first."""
    for name, bias in lstm.named_parameters():
        if name.startswith("bias"):
            nn.init.zeros_(bias)
        if name.startswith("bias_ih"):  # each gate has two biases, which are added
            nn.init.ones_(bias.data[lstm.hidden_size : 2 * lstm.hidden_size])


# before the factory: register_model reads it when it decorates it
default_cfgs: dict[str, DefaultCfg] = resnet_cfgs("cnn_lstm_resnet50", "resnet50")


@register_model
def cnn_lstm_resnet50(pretrained: bool = False, **kwargs: Any) -> CnnLstm:
    """CNN-LSTM on ResNet-50; `pretrained` loads ImageNet weights into the ResNet."""
    return build_on_trunk(CnnLstm, "cnn_lstm_resnet50", pretrained, **kwargs)
