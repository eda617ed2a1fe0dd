"""Put attention blocks into a network that already exists."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from kfde_layers._checks import check_bool, check_mapping
from kfde_layers.layers import Blend

Model = TypeVar("Model", bound=nn.Module)

_CHILD = "kfde"  # the name under which a block joins the module it stands behind


class Point(NamedTuple):
    """A feature map behind which a block can stand."""

    channels: int
    """C of the map."""
    reduction: int
    """Factor by which the image has shrunk to the map."""
    layout: str
    """Order of the map's dimensions, "NCHW" or "NHWC"."""


def insertion_points(model: nn.Module, *, example_input: Tensor | None = None) -> dict[str, Point]:
    """Find where `insert` can put a block.

    Args:
        model: Left as it is, but that lazy modules take their shapes. Of a timm model, the points are the modules in
            its `feature_info`; of any other, all submodules.
        example_input: What to run the model on once, without gradient and in eval mode. None makes an image of zeros
            of the size that the model's `pretrained_cfg` gives (else 224 px), with the model's `in_chans` (else the
            channels of the first convolution).

    Returns:
        The points by module name, in the order in which the forward pass meets them: those that it meets just once
        and that return a feature map, (N, C, H, W) or (N, H, W, C).

    Raises:
        ValueError: The model does not run on the example, or has no convolution to make one from.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Flatten())
        >>> insertion_points(model)
        {'0': Point(channels=16, reduction=2, layout='NCHW')}
    """
    declared: Any = getattr(model, "feature_info", None)
    if isinstance(declared, list):
        names = [info["module"] for info in declared]
    else:
        names = [name for name, _ in model.named_modules() if name]
    found = _probe(model, names, example_input)
    return {name: point[0] for name, point in found.items() if not isinstance(point, str)}


def insert(
    model: Model,
    blocks: Mapping[str, nn.Module | Callable[[int], nn.Module]],
    *,
    example_input: Tensor | None = None,
    identity_start: bool = False,
) -> Model:
    """Put a block behind each named module, in place.

    The block becomes part of the module it stands behind, so that the model's own API (`forward_intermediates`,
    `reset_classifier` and the like) goes on as before and passes through it. Every old key of the state dict keeps
    its name, and a checkpoint of the bare model loads with `strict=False`, the block's keys alone missing.

    Args:
        model: Changed in place.
        blocks: For each module name, a module, or what makes one from a number of channels, such as the class `CSFE`
            or `functools.partial(MFDF, kernel_sizes=(3, 5))`. `insertion_points(model)` names the usual places; any
            submodule will do that returns a feature map and is called once.
        example_input: As in `insertion_points`.
        identity_start: Whether each block is blended in from nothing (`kfde_layers.layers.Blend`), so that a
            pretrained model's outputs stay at first what they were.

    Returns:
        The same model.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A name is no submodule, or its module is not called once, returns no feature map or already holds
            a block; or the block does not run on the map or does not keep its shape. The model is then unchanged.

    Examples:
        >>> from kfde_layers import CSFE
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
        >>> sorted(insert(model, {"1": CSFE}).state_dict())
        ['0.bias', '0.weight', '1.kfde.cfe.bias', '1.kfde.cfe.weight']
    """
    check_mapping("blocks", blocks, "from module names to blocks")
    check_bool("identity_start", identity_start)
    found = _probe(model, blocks, example_input)
    prepared: list[tuple[nn.Module, nn.Module, Tensor]] = []
    for name, block in blocks.items():
        point = found[name]
        if isinstance(point, str):
            raise ValueError(f"cannot insert at {name!r}: {point}")
        (channels, _, layout), output = point
        module = model.get_submodule(name)
        if not callable(block):
            raise TypeError(
                f"the block at {name!r} must be a module or make one of a number of channels, got {block!r}"
            )
        new = block if isinstance(block, nn.Module) else block(channels)
        if identity_start:
            new = Blend(new, channels)
        if layout == "NHWC":
            new = ChannelsFirst(new)
        if any(module is other for other, _, _ in prepared):
            raise ValueError(f"cannot insert at {name!r}: it is one module with another of the names")
        _try(name, new, output)
        prepared.append((module, new, output))

    for module, new, output in prepared:  # nothing can fail from here on
        module.add_module(_CHILD, new.to(output.device, output.dtype).train(module.training))
        if not _runs_its_children(module):
            module.register_forward_hook(_run_child)
    return model


def _try(name: str, block: nn.Module, output: Tensor) -> None:
    """Refuse a block that does not run on the map or changes its shape; neither it nor the model is touched."""
    given = tuple(output.shape)
    try:
        with torch.no_grad():
            shape = tuple(copy.deepcopy(block).to(output.device, output.dtype).eval()(output).shape)
    except Exception as error:
        raise ValueError(f"the block at {name!r} does not run on its map of shape {given}: {error}") from error
    if shape != given:
        raise ValueError(f"the block at {name!r} must keep the shape {given} of its map, got {shape}")


class ChannelsFirst(nn.Module):
    """Run a block made for (N, C, H, W) on (N, H, W, C)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _runs_its_children(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _run_child(self: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    # TorchScript compiles a hook like a method; hence the attribute by name, and `self`
    return self.kfde(output)  # pyright: ignore[reportCallIssue]


def _probe(
    model: nn.Module, names: Iterable[str], example_input: Tensor | None
) -> dict[str, tuple[Point, Tensor] | str]:
    """Run the model once: for each name, the point and its map, or why there is none; in order of the calls."""
    example = _example(model) if example_input is None else example_input
    modules = dict(model.named_modules(remove_duplicate=False))
    outputs: dict[str, list[Any]] = {}
    found: dict[str, tuple[Point, Tensor] | str] = {}
    handles: list[Any] = []
    names = list(names)
    for name in names:
        if not name or name not in modules:
            close = ", ".join(map(repr, get_close_matches(name, modules))) or "none"
            found[name] = f"the model has no submodule of that name; close to it: {close}"
            continue

        def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            outputs.setdefault(name, []).append(output)

        handles.append(modules[name].register_forward_hook(keep))

    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    except Exception as error:
        given = f"an input of shape {tuple(example.shape)}"
        raise ValueError(f"the model does not run on {given}; pass a fitting example_input") from error
    finally:
        for module, mode in training.items():
            module.training = mode
        for handle in handles:
            handle.remove()

    usual = getattr(model, "output_fmt", "NCHW")
    for name, calls in outputs.items():
        found[name] = _point(modules[name], calls, example, usual)
    for name in names:
        found.setdefault(name, "the forward pass does not call it")
    return found


def _point(module: nn.Module, calls: list[Any], example: Tensor, usual_layout: str) -> tuple[Point, Tensor] | str:
    if hasattr(module, _CHILD):
        return "it already holds a block"
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and not _runs_its_children(module):
        return f"a {type(module).__name__} runs its children in its own way, and would take the block for one of them"
    if len(calls) > 1:
        return f"the forward pass calls it {len(calls)} times, and the block would serve them all"
    output = calls[0]
    if not isinstance(output, Tensor):
        return f"it returns a {type(output).__name__}, not a tensor"
    if output.ndim != 4 or not output.is_floating_point():
        return f"it returns no feature map but {output.dtype} of shape {tuple(output.shape)}"
    image, shape = tuple(example.shape[-2:]), output.shape
    candidates = {
        "NCHW": (shape[1], _reduction(image, tuple(shape[2:]))),
        "NHWC": (shape[3], _reduction(image, tuple(shape[1:3]))),
    }
    points = [Point(channels, reduction, layout) for layout, (channels, reduction) in candidates.items() if reduction]
    if not points:
        return f"it returns neither (N, C, H, W) nor (N, H, W, C) of the input but shape {tuple(shape)}"
    return next((point for point in points if point.layout == usual_layout), points[0]), output


def _reduction(image: tuple[int, ...], side: tuple[int, ...]) -> int | None:
    """By what factor an image has shrunk to a map, or None where height and width tell of different ones.

    A side of n px becomes n / r rounded in either direction, so a side only tells r to within an interval. Of the
    whole numbers that both sides allow, a power of two is the likeliest.
    """
    low = max(given / (left + 1) for given, left in zip(image, side, strict=True))
    high = min(given / (left - 1) if left > 1 else math.inf for given, left in zip(image, side, strict=True))
    if not low < high:
        return None
    mean = math.sqrt(math.prod(image) / math.prod(side))
    power = 2 ** math.ceil(math.log2(low))
    return power if low < power < high else max(1, round(mean))


def _example(model: nn.Module) -> Tensor:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError("example_input is needed: the model has no nn.Conv2d from which to guess its input")
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size", (3, 224, 224))[-2:]
    channels = getattr(model, "in_chans", first.in_channels)
    return torch.zeros(1, channels, *size, device=first.weight.device, dtype=first.weight.dtype)
