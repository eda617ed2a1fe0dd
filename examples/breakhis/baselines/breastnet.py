"""BreastNet, with attention in its stages and a hypercolumn over them: the timm model `breastnet`."""

from typing import Any

import torch
from timm.layers import create_attn
from timm.models import DefaultCfg, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from breakhis.baselines.checks import check_int
from breakhis.baselines.network import KERAS_NORM, Network, init_like_keras

__all__ = ["BreastNet", "Hypercolumn", "ResidualBlock"]  # register_model adds the factory

_WIDTHS = (32, 64, 128)
_HIDDEN = 256  # units of each of the two hidden layers


class ResidualBlock(nn.Module):
    r"""Add to the input two convolutions of it.

    \[ y = f\big(x + \mathrm{BN}(\mathrm{conv}(f(\mathrm{BN}(\mathrm{conv}(x)))))\big), \qquad f(t) = \max(t, 0.3 t) \]

    Args:
        channels: Channels of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels, **KERAS_NORM),
            nn.LeakyReLU(0.3),  # the slope of Keras; torch's is 0.01
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels, **KERAS_NORM),
        )
        self.act = nn.LeakyReLU(0.3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return self.act(x + self.residual(x))


class Hypercolumn(nn.Module):
    """Join maps of several stages: average each over the cells of the last one, and concatenate the channels.

    The authors enlarge the maps to the image instead, and then take the mean over all positions. With half-pixel
    bilinear scaling by 2, 4 and 8, the mean of an enlarged map is the mean of the small one. So both ways give the same
    vector where the sides of the image are multiples of 8, and this one does not need 224 channels at the image's size.
    """

    def forward(self, *maps: Tensor) -> Tensor:
        """Join maps (B, C_k, H_k, W_k) to (B, sum of C_k, H, W), with H and W of the last map."""
        size = maps[-1].shape[2:]
        return torch.cat([F.adaptive_avg_pool2d(x, size) for x in maps], dim=1)


class BreastNet(Network):
    r"""BreastNet: three stages with attention (CBAM) and residual blocks, whose maps are joined to a hypercolumn.

    \[ \text{logits} = W\, \mathrm{dense}(\mathrm{dense}(\mathrm{mean}_{hw}(x_1 \,\|\, x_2 \,\|\, x_3))) + b \]

    with x_k the map of stage k after its max pooling, of 32, 64 and 128 channels and a half, a quarter and an eighth of
    the image's sides, `||` the concatenation after enlarging to one size, and dense = linear, batch norm, ReLU. Between
    the two dense layers is a dropout. See `ResidualBlock` and `Hypercolumn`.

    CBAM gates the channels by sigmoid(MLP(mean) + MLP(max)) with an eighth of the channels as hidden units and with
    biases, and then the positions by the sigmoid of a 7 x 7 convolution of the channels' mean and maximum, without bias
    or batch norm.

    Source: Togacar, Ozkurt, Ergen, Comert (2020), Physica A 545: 123592, doi 10.1016/j.physa.2019.123592.

    Fidelity: exact, after the authors' own code (MIT) and their listing of its layers: 603,262 trained parameters with
    two classes.
    Differs from it: TensorFlow 1 enlarged without half-pixel centres, which weighs the border otherwise; the initial
    weights are our choice; sides of the image that are not multiples of 8, which the authors' code does not take, are
    averaged in overlapping cells.
    Their training differs from this example's in three points: it draws the split by image, it goes on with the same
    weights from fold to fold, and it reports the best of five models on the test images.

    Args:
        in_chans: Channels of the image.
        num_classes: Number of classes; 0: no classifier.
        global_pool: "avg", "max", "avgmax" or "".
        drop_rate: Dropout between the two dense layers.

    Raises:
        TypeError: A count is not an integer.
        ValueError: An argument is outside its range.
    """

    def __init__(
        self, *, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", drop_rate: float = 0.3
    ) -> None:
        super().__init__(sum(_WIDTHS), _HIDDEN, drop_rate)
        first, second, third = _WIDTHS
        check_int("in_chans", in_chans, minimum=1)
        self.stage1 = nn.Sequential(_conv_block(in_chans, first), _conv_block(first, first), nn.MaxPool2d(2))
        self.stage2 = _attention_stage(first, second)
        self.stage3 = _attention_stage(second, third)
        self.hypercolumn = Hypercolumn()
        self.feature_info = [
            {"num_chs": first, "reduction": 2, "module": "stage1"},
            {"num_chs": second, "reduction": 4, "module": "stage2"},
            {"num_chs": sum(_WIDTHS), "reduction": 8, "module": "hypercolumn"},
        ]
        self.dense = nn.Sequential(
            *_dense_block(self.num_features, _HIDDEN), nn.Dropout(self.drop_rate), *_dense_block(_HIDDEN, _HIDDEN)
        )
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_like_keras)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, H, W) to (B, 224, H / 8, W / 8), rounded down."""
        first = self.stage1(x)
        second = self.stage2(first)
        return self.hypercolumn(first, second, self.stage3(second))

    def describe(self, x: Tensor) -> Tensor:
        """Turn the hypercolumn, (B, 224, h, w), into (B, 256)."""
        return self.dense(self.global_pool(x))


def _conv_block(in_channels: int, channels: int) -> nn.Sequential:
    """Make a 3 x 3 convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels, **KERAS_NORM), nn.ReLU()
    )


def _attention_stage(in_channels: int, channels: int) -> nn.Sequential:
    """Make a stage of convolution, attention, residual block and max pooling."""
    attention = create_attn("cbam", channels, rd_ratio=1 / 8, mlp_bias=True)
    attention.spatial.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)  # timm's has a batch norm
    return nn.Sequential(_conv_block(in_channels, channels), attention, ResidualBlock(channels), nn.MaxPool2d(2))


def _dense_block(in_features: int, features: int) -> list[nn.Module]:
    """Make a linear layer, batch norm and ReLU."""
    return [nn.Linear(in_features, features), nn.BatchNorm1d(features, **KERAS_NORM), nn.ReLU()]


# before the factory: register_model reads it when it decorates it
default_cfgs: dict[str, DefaultCfg] = generate_default_cfgs(
    {
        "breastnet": {
            "input_size": (3, 224, 224),
            "mean": (0.0, 0.0, 0.0),  # the authors scale to 0..1 and do no more
            "std": (1.0, 1.0, 1.0),
            "first_conv": "stage1.0.0",
            "classifier": "fc",
        }
    }
)


@register_model
def breastnet(pretrained: bool = False, **kwargs: Any) -> BreastNet:
    """BreastNet."""
    return build_model_with_cfg(BreastNet, "breastnet", pretrained, **kwargs)
