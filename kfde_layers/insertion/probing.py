"""Find the feature maps of a network by running it."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kfde_layers._checks import check_instance
from kfde_layers.insertion.adapters import Key, items

CHILD = "kfde"  # the name under which a block joins the module it stands behind

# Before the map there may be no token, a class token, one for distillation too, or a class token and four registers.
_USUAL_PREFIXES = (0, 1, 2, 5)


class Point(NamedTuple):
    """A feature map behind which a block can stand."""

    channels: int
    """C of the map."""
    reduction: int
    """Factor by which the image has shrunk to the map."""
    layout: str
    """Order of the map's dimensions: "NCHW", "NHWC", or "NLC" for a sequence of tokens."""
    num_prefix_tokens: int = 0
    """How many tokens of a sequence stand before those of the map."""


class Found(NamedTuple):
    """What a probing forward has seen of a point."""

    point: Point
    key: Key | None  # of the map within what the module returns, where that holds several tensors
    output: Tensor  # the map, as it was in that forward
    grid: tuple[int, int]  # height and width of the map


def insertion_points(model: nn.Module, *, example_input: Tensor | None = None) -> dict[str, Point]:
    """Find where `insert` can put a block.

    Args:
        model: Left as it is, but that lazy modules take their shapes. Of a timm model, the points are the modules that
            it lists in `feature_info`; of any other, and where the forward pass calls none of these, all submodules.
        example_input: Image (N, C, H, W) to run the model on, without gradient, without autocast and in eval mode. None
            makes one of noise, of the size that the model's `pretrained_cfg` gives (else 224 px), with the model's
            `in_chans` (else the channels of the first convolution).

    Returns:
        The points by module name, in the order in which the forward pass meets them: those that it meets just once
        and that return a feature map, (N, C, H, W), (N, H, W, C) or tokens (N, L, C), alone or as the first one of a
        tuple, list, dict or dataclass.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The model does not run on the example, has no convolution to make one from, or is compiled,
            scripted or wrapped for several devices.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Flatten())
        >>> insertion_points(model)
        {'0': Point(channels=16, reduction=2, layout='NCHW', num_prefix_tokens=0)}
    """
    check_unwrapped(model)
    example = example_for(model, example_input)
    declared: Any = getattr(model, "feature_info", None)
    found: dict[str, Found | str] = {}
    if isinstance(declared, list):
        found = probe(model, dict.fromkeys(info["module"] for info in declared), example)
    if not any(isinstance(at, Found) for at in found.values()):
        names = [name for name, _ in model.named_modules() if name and CHILD not in name.split(".")]
        found = probe(model, names, example)
    return {name: at.point for name, at in found.items() if isinstance(at, Found)}


def check_unwrapped(model: nn.Module) -> None:
    """Refuse what is no model, or one that something has taken hold of which would not see a block."""
    check_instance("model", model, nn.Module)
    for name, module in model.named_modules():
        where = f" (at {name!r})" if name else ""
        classes = [cls.__name__ for cls in type(module).__mro__]
        for wrapper in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"):
            if wrapper in classes:
                raise ValueError(f"model must not be wrapped yet, got {wrapper}{where}: insert first, wrap then")
        if "OptimizedModule" in classes or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"model must not be compiled yet, got a compiled one{where}: insert first, compile then")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"model must not be scripted yet, got a ScriptModule{where}: insert first, script then")


def run(model: nn.Module, example: Tensor, hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Any:
    """Run the model on the example in eval mode, without gradient, with forward hooks on some modules.

    Buffers, modes and the state of random numbers are afterwards what they were.
    """
    # before other hooks, as those of blocks are
    handles = [module.register_forward_hook(hook, prepend=True) for module, hook in hooks]
    training = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers() if not is_lazy(buffer)}
    device = example.device
    autocast = nullcontext() if example.is_meta else torch.autocast(device.type, enabled=False)
    try:
        with torch.no_grad(), autocast, torch.random.fork_rng([device] if device.type == "cuda" else []):
            # not by torch.manual_seed, which reaches devices that are not restored here
            (torch.cuda.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed)(0)
            for module in training:
                module.training = False  # not by eval(), of which some models make more than a flag
            return model(example)
    except Exception as error:
        given = f"an input of shape {tuple(example.shape)}"
        raise ValueError(f"the model does not run on {given}; pass a fitting example_input") from error
    finally:
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for module, mode in training.items():
            module.training = mode
        for handle in handles:
            handle.remove()


def probe(model: nn.Module, names: Iterable[str], example: Tensor) -> dict[str, Found | str]:
    """Run the model once: for each name, what was seen there, or why nothing was; in order of the calls."""
    modules = dict(model.named_modules(remove_duplicate=False))
    outputs: dict[str, list[Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs.setdefault(name, []).append(output)

        return hook

    named = {name: modules.get(name) if name else None for name in names}
    run(model, example, [(module, keep(name)) for name, module in named.items() if module is not None])
    usual_layout = getattr(model, "output_fmt", "NCHW")
    # of the model itself, or of the one that it wraps
    declared: Any = next((m.num_prefix_tokens for m in model.modules() if hasattr(m, "num_prefix_tokens")), None)
    # Hiera sorts its tokens into mask units, and puts them in order again for features only
    in_order = not any(hasattr(module, "reroll") for module in model.modules())
    found = {
        name: _point(modules[name], calls, example, usual_layout, declared, in_order) for name, calls in outputs.items()
    }
    for name, module in named.items():
        if module is None:
            close = ", ".join(map(repr, get_close_matches(name, modules))) or "none"
            found[name] = f"the model has no submodule of that name; close to it: {close}"
    return found | {name: "the forward pass does not call it" for name in named if name not in found}


def _point(
    module: nn.Module,
    calls: list[Any],
    example: Tensor,
    usual_layout: str,
    declared_prefix: int | None,
    in_order: bool,
) -> Found | str:
    if hasattr(module, CHILD):
        return "it already holds a block"
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return own_way(module)
    if len(calls) > 1:
        return f"the forward pass calls it {len(calls)} times, and the block would serve them all"
    output = calls[0]
    held: dict[Key | None, Any] = {None: output} if isinstance(output, Tensor) else {**items(output)}
    tensors = {key: value for key, value in held.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        if value.is_floating_point() and value.shape[:1] == example.shape[:1]:
            if value.ndim == 3 and not in_order:
                return "its tokens are sorted into mask units, not by rows of the image"
            shape, image = tuple(value.shape), (example.shape[-2], example.shape[-1])
            seen = _map_of(shape, image, usual_layout) if value.ndim == 4 else _tokens_of(shape, image, declared_prefix)
            if isinstance(seen, str):
                return seen
            if seen is not None:
                return Found(seen[0], key, value, seen[1])
    given = " and ".join(f"{value.dtype} of shape {tuple(value.shape)}" for value in tensors.values())
    return (
        "it returns no feature map of the input, (N, C, H, W), (N, H, W, C) or tokens (N, L, C), "
        f"but {given or type(output).__name__}"
    )


def own_way(module: nn.Module) -> str:
    """Why a block cannot join a module to which its children are more than a series."""
    return f"{type(module).__name__} runs its children in its own way, and would take the block for one of them"


Seen = tuple[Point, tuple[int, int]]


def _map_of(shape: tuple[int, ...], image: tuple[int, int], usual_layout: str) -> Seen | None:
    grids = {"NCHW": (shape[1], shape[2:4]), "NHWC": (shape[3], shape[1:3])}
    seen = [
        (Point(channels, reduction, layout), (grid[0], grid[1]))
        for layout, (channels, grid) in grids.items()
        if (reduction := _reduction(image, grid))
    ]
    return next((one for one in seen if one[0].layout == usual_layout), next(iter(seen), None))


def _tokens_of(shape: tuple[int, ...], image: tuple[int, int], declared_prefix: int | None) -> Seen | str | None:
    if len(shape) != 3:
        return None
    seen = {
        prefix: (Point(shape[2], reduction, "NLC", prefix), grid)
        for prefix in (_USUAL_PREFIXES if declared_prefix is None else {declared_prefix, *_USUAL_PREFIXES})
        if (grid := _patches(image, shape[1] - prefix)) and (reduction := _reduction(image, grid))
    }
    if declared_prefix in seen:
        return seen[declared_prefix]
    if len(seen) > 1:
        return (
            f"its {shape[1]} tokens may stand for a map behind {' or '.join(map(str, seen))} prefix tokens; a square "
            "example_input, or one of another size, may tell"
        )
    return next(iter(seen.values()), None)


def _patches(image: tuple[int, int], number: int) -> tuple[int, int] | None:
    """How many square patches lie along each side, if so many in all can cover the image, or fit into it."""
    height, width = image
    for side in range(1, max(image) + 1):
        for grid in ((height // side, width // side), (-(-height // side), -(-width // side))):
            if math.prod(grid) == number > 0:
                return grid
    return None


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


def example_for(model: nn.Module, example_input: Tensor | None) -> Tensor:
    """What the caller gave, or an image of noise of the size and the number of channels that the model takes."""
    if example_input is not None:
        check_instance("example_input", example_input, Tensor)
        if example_input.ndim != 4:
            raise ValueError(f"example_input must have shape (N, C, H, W), got {tuple(example_input.shape)}")
        return example_input
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or not first.in_channels:
        raise ValueError("example_input is needed: the model has no nn.Conv2d from which to guess its input")
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size", (3, 224, 224))[-2:]
    channels = getattr(model, "in_chans", first.in_channels)
    noise = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(first.weight.device, first.weight.dtype)
