"""The parts of a layer: whether one may be merged instead of called, and how it starts.

A part (`cfe`, `sfe`, a branch, `fc1`, `fc2`) is a module, and other tools treat it as one: they hook it, prune it, wrap
it, replace it, or keep its weights elsewhere until it is called. So a layer calls its parts. Only a plain part may be
merged instead, which means that the layer reads its parameters and computes the same in another way.
"""

import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kfde_layers._checks import check_device

Part = TypeVar("Part", bound=nn.Module)


def why_not_plain(part: nn.Module, made: type[nn.Module]) -> str | None:
    """Return why `part` must be called, as the end of a sentence, or None if it is plain.

    A part is plain if it is still exactly of the type that the layer `made`, if no hook is set on it, and if its
    instance has no forward of its own. Parametrizations (`torch.nn.utils.parametrize`) leave it plain: its attributes
    are what they compute. Layers ask at every call, so this reads the dict of the instance, which is fast.
    """
    if type(part) is not made and type_before_parametrizations(part) is not made:
        return f"is of type {type(part).__name__} instead of {made.__name__}"
    attributes = part.__dict__
    if (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    ):
        return "has a forward or backward hook"
    if "forward" in attributes or "_conv_forward" in attributes:
        return "has a forward of its own"
    return None


OTHER_SETTINGS = (
    "has another kernel size, stride, padding, padding mode, dilation, groups or bias than the layer gave it"
)


class ConvSettings(NamedTuple):
    """What a branch's convolution must keep to be merged."""

    has_bias: bool
    """Whether it has a bias; read of plain branches only, since a norm's intercept takes the place of a missing one."""
    geometry: tuple[object, ...]
    """Sizes, padding mode and groups, as `conv_geometry` returns them."""


def conv_settings(conv: nn.Module) -> ConvSettings:
    """Return the settings of a convolution."""
    return ConvSettings(has_bias(conv), conv_geometry(conv))


def has_bias(conv: nn.Module) -> bool:
    """Return whether a convolution has a bias, without reading one that a parametrization computes."""
    return conv.__dict__["_parameters"].get("bias", conv) is not None


def conv_geometry(conv: nn.Module) -> tuple[object, ...]:
    """Return the attributes of a convolution that decide which values meet."""
    attributes = conv.__dict__
    return (
        attributes["kernel_size"],
        attributes["stride"],
        attributes["padding"],
        attributes["dilation"],
        attributes["groups"],
        attributes["padding_mode"],
    )


def why_not_plain_conv(conv: nn.Module, settings: ConvSettings) -> str | None:
    """Return why a branch's convolution must be called, or None if it is plain and still has the layer's settings."""
    if reason := why_not_plain(conv, nn.Conv2d):
        return reason
    if has_bias(conv) != settings[0] or conv_geometry(conv) != settings[1]:  # numbers are quicker than names
        return OTHER_SETTINGS
    return None


def read(part: nn.Module, name: str) -> Any:
    """Return a parameter or buffer of a part. Its dicts take a tenth of the time of `getattr`."""
    attributes = part.__dict__
    if (tensor := attributes["_parameters"].get(name)) is not None:
        return tensor
    if (tensor := attributes["_buffers"].get(name)) is not None:
        return tensor
    return getattr(part, name)  # None, or computed by a parametrization, or a replica's


def why_not_readable(tensor: Tensor) -> str | None:
    """Return why a parameter cannot be read in place of calling its part, or None if it can."""
    if type(tensor) is not nn.Parameter and is_traceable_wrapper_subclass(tensor):  # as quantised tensors are
        return f"has a parameter of type {type(tensor).__name__}"
    return None


def check_device_of(name: str, part: nn.Module, made: type[nn.Module], x: Tensor) -> None:
    """Refuse a plain part on another device than `x`: PyTorch does not always, and computes with unwritten memory.

    A part that has a hook may get its parameters at the call.
    """
    if why_not_plain(part, made) is None:
        for key, parameter in part.__dict__["_parameters"].items():
            if parameter is not None:
                check_device(f"{key} of {name}", parameter, x)


def check_private_training(name: str, conv: nn.Module, *, contiguous: bool) -> None:
    """Refuse maps that are not contiguous where Opacus takes the gradients of a convolution by a rule of its own.

    This rule (Opacus 1.6) takes the strides of the map for those of a contiguous one, and its gradients are wrong. With
    `grad_sample_mode="functorch"` it differentiates the convolution itself.
    """
    if contiguous or not isinstance(conv, nn.Conv2d) or not conv.training:
        return
    weight = conv.__dict__["_parameters"].get("weight")
    if hasattr(weight, "grad_sample") and weight.requires_grad and not hasattr(conv, "ft_compute_sample_grad"):
        raise NotImplementedError(
            f"{name} must get a contiguous map in Opacus' grad_sample_mode 'hooks' or 'ghost', which compute wrong "
            "gradients of each sample from one in channels_last; got one in channels_last. "
            "Pass grad_sample_mode='functorch' to make_private"
        )


def watched_everywhere() -> bool:
    """Return whether a hook is set on all modules of the process, which must then see the parts too."""
    return not torch.compiler.is_compiling() and bool(nn_module._has_any_global_hook())  # pyright: ignore[reportPrivateUsage]


def call_linear(name: str, fc: nn.Module, p: Tensor) -> Tensor:
    """Return fc(p) in the dtype of p, which is that of the statistics."""
    check_device_of(name, fc, nn.Linear, p)
    attributes, parameters = fc.__dict__, fc.__dict__["_parameters"]
    weight: Any = attributes.get("weight")  # where a hook makes it
    if weight is None and isinstance(parameters, dict):  # not so in a scripted module
        weight = cast("dict[str, Tensor | None]", parameters).get("weight")
    if weight is None or not weight.is_floating_point():  # in a wrapper, or quantised
        floating = [parameter for parameter in fc.parameters() if parameter.is_floating_point()]
        weight = floating[0] if floating else p
    if weight.dtype == p.dtype:
        return fc(p).to(p.dtype)
    if why_not_plain(fc, nn.Linear) is None and why_not_readable(weight) is None:
        # In 16 bits the product would be rounded: read the parameters and upcast them.
        bias = cast("Tensor | None", fc.bias)
        return F.linear(p, cast(Tensor, fc.weight).to(p.dtype), None if bias is None else bias.to(p.dtype))
    return fc(p.to(weight.dtype)).to(p.dtype)


def start_with(part: Part, initialise: Callable[[Part], None]) -> Part:
    """Let `part.reset_parameters()` run `initialise(part)`, and return the part.

    The part keeps its type: tools that choose modules by their exact type (`quantize_dynamic`, `fuse_modules`, counters
    of operations) must find PyTorch's own.
    """
    part.__dict__["reset_parameters"] = _Start(part, initialise)
    return part


class _Start(Generic[Part]):
    """Initialise a part. Copied and pickled with it; a weak reference, so that a deleted part is freed at once."""

    def __init__(self, part: Part, initialise: Callable[[Part], None]) -> None:
        self._part = weakref.ref(part)
        self._initialise = initialise

    def __call__(self) -> None:
        part = self._part()
        if part is not None:
            self._initialise(part)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Start, (self._part(), self._initialise)


def start_as_noise(part: nn.Conv2d | nn.Linear) -> None:
    """Draw the weight from a truncated normal distribution of deviation 0.02, and set the bias to zero.

    In 16 bits older versions of PyTorch draw values of 100 deviations, so the weight is drawn in at least 32.
    """
    dtype = torch.promote_types(part.weight.dtype, torch.float32)
    noise = nn.init.trunc_normal_(part.weight.detach().new_empty(part.weight.shape, dtype=dtype), std=0.02)
    with torch.no_grad():
        part.weight.copy_(noise)
    if part.bias is not None:
        nn.init.zeros_(part.bias)


def start_near_identity(conv: nn.Conv2d) -> None:
    """Start a depthwise convolution as a Dirac kernel plus that noise, so that its output is near its input."""
    start_as_noise(conv)
    noise = conv.weight.detach().clone()
    nn.init.dirac_(conv.weight, groups=conv.groups)
    with torch.no_grad():
        conv.weight.add_(noise)
