"""ConvNeXt-V2 with KFDE after its stages: the timm models `kfde_convnextv2_*`.

The code of this project is Apache-2.0; the ConvNeXt-V2 weights that `pretrained=True` loads are CC BY-NC 4.0.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.models import (
    DefaultCfg,
    build_model_with_cfg,
    checkpoint_seq,
    convnext,
    generate_default_cfgs,
    register_model,
)
from timm.models import get_pretrained_cfg as backbone_cfg
from torch import Tensor, nn

from kfde_layers._checks import check_bool, check_int, check_sequence
from kfde_layers._named import with_layers
from kfde_layers.layers import CSFE, MFDF, Blend
from kfde_layers.layers.parts import check_private_training

__all__ = ["KFDEConvNeXt", "KFDEStage"]  # register_model adds the factories

_logger = logging.getLogger(__name__)


class KFDEStage(nn.Module):
    """A ConvNeXt stage that ends in KFDE.

    KFDE is a part of the stage, not a module next to it. Everything that timm does with stages (`features_only`,
    `forward_intermediates`, pruning, gradient checkpointing) then includes KFDE.

    Args:
        stage: The stage to extend; its keys in a state dict stay as they are.
        kfde: Maps (N, C, H, W) to the same shape.
    """

    def __init__(self, stage: convnext.ConvNeXtStage, kfde: nn.Sequential) -> None:
        super().__init__()
        self.grad_checkpointing: bool = stage.grad_checkpointing
        self.downsample: nn.Module = stage.downsample
        self.blocks: nn.Sequential = stage.blocks
        self.kfde = kfde

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if not torch.jit.is_scripting():
            for block in self.blocks:
                if isinstance(block, convnext.ConvNeXtBlock):  # its norm leaves maps in channels_last
                    check_private_training("conv_dw of ConvNeXt", block.conv_dw, contiguous=False)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
            x = checkpoint_seq(self.kfde, x)
        else:
            x = self.blocks(x)
            x = self.kfde(x)
        return x


class KFDEConvNeXt(convnext.ConvNeXt):
    """ConvNeXt with CSFE and then MFDF after chosen stages.

    Source: Cui et al., "Key Feature Dynamic Enhancement Network for Breast Cancer Pathological Image Classification",
    Figure 1: the blocks follow the backbone and precede the pooling. The paper does not say whether there are blocks
    after earlier stages too; `kfde_stages` allows them.

    Args:
        csfe: Whether there is a CSFE; a dict gives its options, as in `dict(arrangement="cfe_sfe")`.
        mfdf: Whether there is an MFDF; a dict gives its options, as in `dict(kernel_sizes=(3, 5))`. Its `norm_layer`
            and `act_layer` may be timm's names, such as "batchnorm2d" and "relu", which a saved configuration can hold.
        kfde_stages: The stages, counted from 0, that end in KFDE.
        identity_start: Whether each block starts as the identity (`kfde_layers.layers.Blend`), so that a pretrained
            backbone starts unchanged.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **kwargs: Arguments of timm's ConvNeXt, such as `depths`, `dims`, `num_classes`, `in_chans`, `drop_path_rate`.

    Raises:
        TypeError: An argument has the wrong type, for example `csfe` or `mfdf` is neither a bool nor a dict.
        ValueError: `kfde_stages` names a stage that does not exist, or timm has no layer of a name.
    """

    def __init__(
        self,
        csfe: bool | Mapping[str, Any] = True,
        mfdf: bool | Mapping[str, Any] = True,
        kfde_stages: Sequence[int] = (3,),
        identity_start: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_bool("identity_start", identity_start)
        # KFDE is attached afterwards: ConvNeXt's initialiser would overwrite the blocks' initial values.
        super().__init__(**kwargs, device=device, dtype=dtype)
        blocks = {"csfe": (CSFE, _options("csfe", csfe)), "mfdf": (MFDF, _options("mfdf", mfdf))}
        stages = check_sequence("kfde_stages", kfde_stages, "stages, such as (3,)")
        for index in sorted({check_int("kfde_stages", index, minimum=0) for index in stages}):
            if index not in range(len(self.stages)):
                raise ValueError(f"kfde_stages must lie in 0 ... {len(self.stages) - 1}, got {index}")
            channels = self.feature_info[index]["num_chs"]
            kfde: OrderedDict[str, nn.Module] = OrderedDict()
            for name, (layer, options) in blocks.items():
                if options is None:
                    continue
                try:
                    block = layer(channels, **options, device=device, dtype=dtype)
                except TypeError as error:
                    raise TypeError(f"{name} must hold arguments of {layer.__name__}: {error}") from error
                kfde[name] = Blend(block, channels, device=device, dtype=dtype) if identity_start else block
            if kfde:
                stage = cast(convnext.ConvNeXtStage, self.stages[index])
                self.stages[index] = KFDEStage(stage, nn.Sequential(kfde))


def _options(name: str, value: bool | Mapping[str, Any]) -> Mapping[str, Any] | None:
    if isinstance(value, Mapping):
        return with_layers(name, value)
    if value is True:
        return {}
    if value is False:
        return None
    raise TypeError(f"{name} must be a bool or a dict of layer options, got {value!r} of type {type(value).__name__}")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: KFDEConvNeXt) -> dict[str, Any]:
    """Fit a checkpoint to the model, strictly.

    A checkpoint without KFDE gets the model's own KFDE values. timm stops being strict as soon as the number of
    classes differs, so the keys are compared here. Any difference is refused, with two exceptions: the classifier that
    timm then drops, and the head that a self-supervised checkpoint does not have.

    Raises:
        RuntimeError: Keys are missing or unexpected. A checkpoint with some KFDE keys must have all of them.
    """
    state_dict = dict(convnext.checkpoint_filter_fn(state_dict, model))
    own = model.state_dict()
    if not any(".kfde." in key for key in state_dict):
        fresh = [key for key in own if ".kfde." in key]
        state_dict |= {key: own[key] for key in fresh}
        _logger.info("The checkpoint has no KFDE, so these parameters keep their initial values: %s", ", ".join(fresh))

    config: Any = model.pretrained_cfg
    if config["num_classes"] == 0 and not any(key.startswith("head.") for key in state_dict):
        dropped = "head."
    elif config["num_classes"] != model.num_classes:
        dropped = config["classifier"] + "."
    else:
        dropped = None
    different = own.keys() ^ state_dict.keys()
    if dropped is not None:
        different = {key for key in different if not key.startswith(dropped)}
    if different:
        missing = ", ".join(sorted(different & own.keys())) or "none"
        unexpected = ", ".join(sorted(different - own.keys())) or "none"
        raise RuntimeError(f"The checkpoint does not fit the model. Missing keys: {missing}. Unexpected: {unexpected}.")
    return state_dict


_SIZES = ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "huge")

# Every set of weights that timm has for a backbone, under the same tag. Defined before the factories, because
# register_model reads it when it decorates them.
_backbone_cfgs: dict[str, Any] = {
    f"kfde_convnextv2_{size}.{tag}": backbone_cfg(f"convnextv2_{size}.{tag}")
    for size in _SIZES
    for tag in convnext.default_cfgs[f"convnextv2_{size}"].tags
}
default_cfgs: dict[str, DefaultCfg] = generate_default_cfgs(_backbone_cfgs)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> KFDEConvNeXt:
    model_args: dict[str, Any] = {"use_grn": True, "ls_init_value": None, **kwargs}
    return build_model_with_cfg(
        KFDEConvNeXt,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        pretrained_strict=False,  # the filter is strict, and allows for the keys that timm drops later
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **model_args,
    )


@register_model
def kfde_convnextv2_atto(pretrained: bool = False, **kwargs: Any) -> KFDEConvNeXt:
    """ConvNeXt-V2 Atto with KFDE."""
    model_args = dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), conv_mlp=True)
    return _create("kfde_convnextv2_atto", pretrained, **dict(model_args, **kwargs))


@register_model
def kfde_convnextv2_femto(pretrained: bool = False, **kwargs: Any) -> KFDEConvNeXt:
    """ConvNeXt-V2 Femto with KFDE."""
    model_args = dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384), conv_mlp=True)
    return _create("kfde_convnextv2_femto", pretrained, **dict(model_args, **kwargs))


@register_model
def kfde_convnextv2_pico(pretrained: bool = False, **kwargs: Any) -> KFDEConvNeXt:
    """ConvNeXt-V2 Pico with KFDE."""
    model_args = dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512), conv_mlp=True)
    return _create("kfde_convnextv2_pico", pretrained, **dict(model_args, **kwargs))


@register_model
def kfde_convnextv2_nano(pretrained: bool = False, **kwargs: Any) -> KFDEConvNeXt:
    """ConvNeXt-V2 Nano with KFDE."""
    model_args = dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640), conv_mlp=True)
    return _create("kfde_convnextv2_nano", pretrained, **dict(model_args, **kwargs))


@register_model
def kfde_convnextv2_tiny(pretrained: bool = False, **kwargs: Any) -> KFDEConvNeXt:
    """ConvNeXt-V2 Tiny with KFDE."""
    model_args = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
    return _create("kfde_convnextv2_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def kfde_convnextv2_small(pretrained: bool = False, **kwargs: Any) -> KFDEConvNeXt:
    """ConvNeXt-V2 Small with KFDE."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768))
    return _create("kfde_convnextv2_small", pretrained, **dict(model_args, **kwargs))


@register_model
def kfde_convnextv2_base(pretrained: bool = False, **kwargs: Any) -> KFDEConvNeXt:
    """ConvNeXt-V2 Base with KFDE."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024))
    return _create("kfde_convnextv2_base", pretrained, **dict(model_args, **kwargs))


@register_model
def kfde_convnextv2_large(pretrained: bool = False, **kwargs: Any) -> KFDEConvNeXt:
    """ConvNeXt-V2 Large with KFDE."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536))
    return _create("kfde_convnextv2_large", pretrained, **dict(model_args, **kwargs))


@register_model
def kfde_convnextv2_huge(pretrained: bool = False, **kwargs: Any) -> KFDEConvNeXt:
    """ConvNeXt-V2 Huge with KFDE."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(352, 704, 1408, 2816))
    return _create("kfde_convnextv2_huge", pretrained, **dict(model_args, **kwargs))
