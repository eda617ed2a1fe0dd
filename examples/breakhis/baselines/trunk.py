"""A network whose feature map comes from a timm network, its trunk, and the trunk's ImageNet weights."""

from dataclasses import replace
from typing import Any

import timm
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    resnet,
)
from torch import Tensor, nn

from breakhis.baselines.checks import check_int
from breakhis.baselines.network import Network


class TrunkNetwork(Network):
    """A network on the feature map of a timm network.

    Args:
        trunk: From `make_trunk`.
        head_hidden_size: Length of the vector.
        drop_rate: Share of the values that dropout sets to 0.
    """

    def __init__(self, trunk: nn.Module, head_hidden_size: int, drop_rate: float) -> None:
        super().__init__(trunk.num_features, head_hidden_size, drop_rate)
        self.trunk = trunk
        self.feature_info = [{**info, "module": f"trunk.{info['module']}"} for info in trunk.feature_info]

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the trunk's feature map.

        Raises:
            ValueError: The trunk returns something else, such as tokens.
        """
        x = self.trunk.forward_features(x)
        if x.ndim != 4 or x.shape[1] != self.num_features:
            wanted = f"(N, {self.num_features}, H, W)"
            raise ValueError(f"backbone must return a feature map {wanted}, got one of shape {tuple(x.shape)}")
        return x


def make_trunk(backbone: str, in_chans: int, **kwargs: Any) -> nn.Module:
    """Make a timm network without its classifier.

    Args:
        backbone: Name of a timm model.
        in_chans: Channels of the image.
        **kwargs: Further arguments of the model.

    Raises:
        TypeError: `in_chans` is not an integer.
        ValueError: timm does not know the model, or `in_chans` is not positive.
    """
    if not isinstance(backbone, str) or not timm.is_model(backbone):
        raise ValueError(f"backbone must be a model that timm knows, got {backbone!r}")
    check_int("in_chans", in_chans, minimum=1)
    return timm.create_model(backbone, in_chans=in_chans, num_classes=0, **kwargs)


def resnet_cfgs(variant: str, backbone: str) -> dict[str, DefaultCfg]:
    """Return the configurations of a network on a ResNet: one for each of timm's weights, under the same tag."""
    tags = resnet.default_cfgs[backbone].tags
    return generate_default_cfgs({f"{variant}.{tag}": trunk_cfg(variant, f"{backbone}.{tag}") for tag in tags})


def trunk_cfg(variant: str, backbone: str) -> PretrainedCfg:
    """Return timm's configuration of a backbone's weights, changed to that of a network on it."""
    cfg = get_pretrained_cfg(backbone)
    first = cfg.first_conv
    return replace(
        cfg,
        architecture=variant,
        first_conv=f"trunk.{first}" if isinstance(first, str) else None,
        classifier="fc",
        fixed_input_size=False,  # else timm would give the network an img_size
        pool_size=None,  # this and the next one are of the backbone's last map, which may have another stride here
        test_pool_size=None,
    )


def build_on_trunk(network: type[TrunkNetwork], variant: str, pretrained: bool, **kwargs: Any) -> TrunkNetwork:
    """Build a network on a trunk. The weights that timm loads are those of the trunk, or a file of the whole network.

    Args:
        network: The class.
        variant: Its registered name, which ends in the name of its usual backbone.
        pretrained: Whether to load ImageNet weights into the trunk.
        **kwargs: Arguments of the class and of `build_model_with_cfg`. A `backbone` other than the usual one brings its
            own configuration.
    """
    backbone = str(kwargs.get("backbone", ""))
    usual = not backbone or variant.endswith(f"_{backbone}")
    if not usual and not kwargs.get("pretrained_cfg") and timm.is_model(backbone):
        kwargs["pretrained_cfg"] = trunk_cfg(variant, backbone)
    return build_model_with_cfg(network, variant, pretrained, pretrained_filter_fn=fit_trunk, **kwargs)


def fit_trunk(state_dict: dict[str, Tensor], model: TrunkNetwork) -> dict[str, Tensor]:
    """Fit a file of the trunk's weights to a network; the rest of the network keeps its initial values.

    A file of the whole network passes unchanged. timm ignores missing keys as soon as the number of classes differs, so
    the keys of the trunk are compared here.

    Raises:
        RuntimeError: Keys of the trunk are missing or left over.
    """
    if any(key.startswith("trunk.") for key in state_dict):
        return state_dict
    names = model.trunk.pretrained_cfg["classifier"] or ()
    heads = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    given = {f"trunk.{key}": value for key, value in state_dict.items() if not key.startswith(heads)}
    own = model.state_dict()
    fresh = {key for key in own if not key.startswith("trunk.") or ".se." in key or key.endswith("num_batches_tracked")}
    if different := sorted((own.keys() ^ given.keys()) - fresh):
        raise RuntimeError(f"weights must be those of the backbone, got {len(different)} other keys: {different[0]}")
    return {key: own[key] for key in fresh} | given
