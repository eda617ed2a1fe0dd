"""A branch of MFDF with a norm or an activation."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfde_layers.layers.parts import (
    OTHER_SETTINGS,
    ConvSettings,
    check_device_of,
    check_private_training,
    conv_geometry,
    read,
    watched_everywhere,
    why_not_plain,
    why_not_readable,
)
from kfde_layers.ops.formats import autocasts
from kfde_layers.ops.mfdf import is_empty

NOT_AFFINE = "has a batch norm without affine parameters or running statistics"


class ConvNormAct(nn.Module):
    """Convolve, normalise, activate; without an activation, `act` is None.

    In evaluation a batch norm is linear in its input: if both are plain, the convolution takes it over, which saves one
    pass over the map. TorchScript and torch.fx record the calls.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, act: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv
        self.norm: Any = norm
        self.register_module("act", act)  # refuses later what is no module, even where it is None

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._activate(self.norm(self.conv(x)))
        else:
            conv = self.conv
            folded = None if isinstance(x, torch.fx.Proxy) else self._fold_if_plain()
            if folded is None:
                return self._activate(self.norm(conv(x)))
            weight, bias = folded
            return self._activate(F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups))

    def _activate(self, y: Tensor) -> Tensor:
        return y if self.act is None else self.act(y)  # pyright: ignore[reportUnnecessaryComparison, reportCallIssue]

    def _fold_if_plain(self) -> tuple[Tensor, Tensor] | None:
        """Return weight and bias of the convolution that takes over the norm, or None if it cannot now."""
        conv, norm = self.conv, self.norm
        if why_not_plain(conv, nn.Conv2d) or conv.padding_mode != "zeros" or _why_not_linear(norm):
            return None
        if watched_everywhere():
            return None
        weight, scale = conv.weight, norm.weight
        # In 16 bits the product of weight and scale would be rounded, which the norm itself does not do.
        exact = weight.dtype in (torch.float32, torch.float64) and scale is not None and scale.dtype == weight.dtype
        return _fold(weight, conv.bias, norm) if exact and not why_not_readable(weight) else None

    def folded(self) -> tuple[Tensor, Tensor] | None:
        """Return weight and bias of the convolution that equals convolution and norm, in float32 or float64.

        Return None for a norm without affine parameters or running statistics.
        """
        conv, norm = cast(nn.Conv2d, self._modules["conv"]), cast(nn.Module, self._modules["norm"])
        return _fold(read(conv, "weight"), read(conv, "bias"), norm)


def call_branch(name: str, branch: nn.Module, x: Tensor) -> Tensor:
    """Return branch(x), in the dtype of its parameters; refuse a plain convolution on another device than x."""
    conv = branch if why_not_plain(branch, ConvNormAct) else cast(ConvNormAct, branch).conv
    check_device_of(name, conv, nn.Conv2d, x)
    check_private_training(name, conv, contiguous=x.is_contiguous())
    if not autocasts(x):
        # a list, since older compilers of PyTorch do not read `next` with a default
        dtypes = [parameter.dtype for parameter in branch.parameters() if parameter.is_floating_point()]
        x = x.to(dtypes[0]) if dtypes else x
    if is_empty(x):  # which conv2d refuses; the parameters stay in the graph, with gradients of zero
        return x + sum(0 * parameter.sum() for parameter in branch.parameters())
    return branch(x)


def why_not_one_conv(branch: nn.Module, settings: ConvSettings) -> str | None:
    """Return why a branch does not equal one convolution with these settings now, or None if it does."""
    if reason := why_not_plain(branch, ConvNormAct):
        return reason
    parts: dict[str, Any] = branch.__dict__["_modules"]
    conv = parts["conv"]
    if reason := why_not_plain(conv, nn.Conv2d):
        return f"has a part conv that {reason}"
    if conv_geometry(conv) != settings[1]:
        return f"has a part conv that {OTHER_SETTINGS}"
    if reason := _why_not_linear(parts["norm"]):
        return reason
    if parts["act"] is not None:
        return "has an activation"
    return None


def _why_not_linear(norm: nn.Module) -> str | None:
    """Return why a norm is no fixed affine function now, as the end of a sentence about the branch, or None."""
    if reason := why_not_plain(norm, nn.BatchNorm2d):
        return f"has a part norm that {reason}"
    attributes = norm.__dict__
    if attributes["training"]:
        return "has a batch norm in training"
    if not attributes["affine"] or not attributes["track_running_stats"]:
        return NOT_AFFINE
    return None


def _fold(conv_weight: Tensor, conv_bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor] | None:
    dtype = torch.promote_types(conv_weight.dtype, torch.float32)
    tensors = [read(norm, name) for name in ("weight", "bias", "running_mean", "running_var")]
    if any(tensor is None for tensor in tensors):
        return None
    weight, bias, mean, variance = (tensor.to(dtype) for tensor in tensors)
    scale = weight * torch.rsqrt(variance + norm.eps)
    intercept = bias - mean * scale
    if conv_bias is not None:
        intercept = intercept + conv_bias.to(dtype) * scale
    return conv_weight.to(dtype) * scale[:, None, None, None], intercept
