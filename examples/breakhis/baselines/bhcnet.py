"""BHCNet, which learns from random weights with small SE-ResNet modules: the timm models `bhcnet_3` and `bhcnet_6`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import BatchNormAct2d, SEModule
from timm.models import DefaultCfg, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from breakhis.baselines.checks import check_int
from breakhis.baselines.network import KERAS_NORM, Network, init_like_keras

__all__ = ["BHCNet", "SmallSEResNetModule"]  # register_model adds the factories

_norm_relu = partial(BatchNormAct2d, act_layer=nn.ReLU, **KERAS_NORM)


class SmallSEResNetModule(nn.Module):
    r"""Add to the input a small residual whose channels are weighted.

    \[ y = S(x) + s \odot R(x), \qquad s = \sigma\big(W_2 \max(0, W_1 \,\mathrm{mean}_{hw} R(x))\big) \]

    with R = four convolutions 1 x 3, 3 x 1, 1 x 3, 3 x 1, each after a batch norm and a ReLU, and S = the identity, or
    a 1 x 1 convolution of x where stride or width changes. No activation follows the sum.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output, and of each convolution; the gate has a sixteenth as many hidden units.
        stride: Stride of the first convolution, along both sides.
        leading_norm: Whether a batch norm and a ReLU precede the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, leading_norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = [_norm_relu(in_channels)] if leading_norm else []
        layers.append(nn.Conv2d(in_channels, channels, (1, 3), stride, padding=(0, 1)))
        for kernel_size, padding in (((3, 1), (1, 0)), ((1, 3), (0, 1)), ((3, 1), (1, 0))):
            layers += [_norm_relu(channels), nn.Conv2d(channels, channels, kernel_size, padding=padding)]
        self.residual = nn.Sequential(*layers)
        self.se = SEModule(channels, rd_channels=max(1, channels // 16), bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H / stride, W / stride), rounded up."""
        return self.shortcut(x) + self.se(self.residual(x))


class BHCNet(Network):
    r"""BHCNet: three stages of small SE-ResNet modules, without any pooling between them.

    \[ \text{logits} = W \,\mathrm{mean}_{hw}\, \mathrm{ReLU}(\mathrm{BN}(\text{stages}(\mathrm{ReLU}(\mathrm{BN}(
       \mathrm{conv}_{3 \times 3}(x)))))) + b \]

    An image of 224 x 224 px has maps of 224, 112 and 56 px with 16, 32 and 64 channels. See `SmallSEResNetModule`.

    Source: Jiang, Chen, Zhang, Xiao (2019), PLoS ONE 14(3): e0214587, doi 10.1371/journal.pone.0214587.

    Fidelity: exact in layout and in the paper's numbers of parameters for CIFAR-10 and CIFAR-100 (198K and 204K with
    three modules in a stage, 401K and 407K with six). The modules and the CIFAR networks are in the authors' code
    (MIT), but the network for BreakHis is not: that it has the same stem is inferred.
    Differs from the authors' Keras code: convolutions of stride 2 pad both sides, where Keras pads the far side alone.
    Unknown: augmentation, split, and which of the two networks gave which published row. The mean and deviation of the
    images are our choice; others use those of each magnification.

    The authors train with L2 of 1e-4 on weights, which in torch's SGD is a weight decay of 2e-4, and with
    `GaussErrorScheduler`.

    Args:
        modules_per_stage: Modules in each stage.
        widths: Channels of each stage; each stage but the first halves the sides of the map.
        in_chans: Channels of the image.
        num_classes: Number of classes; 0: no classifier.
        global_pool: "avg", "max", "avgmax" or "".
        drop_rate: Dropout before the classifier; the authors have none.

    Raises:
        TypeError: A count is not an integer.
        ValueError: An argument is outside its range.
    """

    def __init__(
        self,
        modules_per_stage: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        check_int("modules_per_stage", modules_per_stage, minimum=1)
        if not widths:
            raise ValueError(f"widths must name the channels of at least one stage, got {widths!r}")
        for channels in widths:
            check_int("widths", channels, minimum=1)
        width, last = widths[0], widths[-1]
        super().__init__(last, last, drop_rate)
        self.stem = nn.Sequential(
            nn.Conv2d(check_int("in_chans", in_chans, minimum=1), width, 3, padding=1), _norm_relu(width)
        )
        self.stages = nn.Sequential()
        for index, channels in enumerate(widths):
            stage = nn.Sequential()
            for number in range(modules_per_stage):
                stride = 2 if index > 0 and number == 0 else 1
                # the stem ends in a batch norm and a ReLU already
                stage.append(SmallSEResNetModule(width, channels, stride, leading_norm=index + number > 0))
                width = channels
            self.stages.append(stage)
        self.norm = _norm_relu(last)
        self.feature_info = [
            {"num_chs": channels, "reduction": 2**index, "module": f"stages.{index}"}
            for index, channels in enumerate(widths)
        ]
        self.feature_info[-1]["module"] = "norm"
        self.dropout = nn.Dropout(self.drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_like_keras)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, H, W) to (B, 64, H / 4, W / 4), rounded up."""
        return self.norm(self.stages(self.stem(x)))

    def describe(self, x: Tensor) -> Tensor:
        """Pool the feature map, (B, 64, h, w), to (B, 64)."""
        return self.dropout(self.global_pool(x))


_CFG = {
    "input_size": (3, 224, 224),
    "mean": IMAGENET_INCEPTION_MEAN,
    "std": IMAGENET_INCEPTION_STD,
    "first_conv": "stem.0",
    "classifier": "fc",
}
# before the factories: register_model reads it when it decorates them
default_cfgs: dict[str, DefaultCfg] = generate_default_cfgs({"bhcnet_3": _CFG, "bhcnet_6": _CFG})


@register_model
def bhcnet_3(pretrained: bool = False, **kwargs: Any) -> BHCNet:
    """BHCNet with three modules in each stage."""
    return build_model_with_cfg(BHCNet, "bhcnet_3", pretrained, modules_per_stage=3, **kwargs)


@register_model
def bhcnet_6(pretrained: bool = False, **kwargs: Any) -> BHCNet:
    """BHCNet with six modules in each stage."""
    return build_model_with_cfg(BHCNet, "bhcnet_6", pretrained, modules_per_stage=6, **kwargs)
