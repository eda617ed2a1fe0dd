"""Find the feature maps of a network by running it."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NamedTuple

from torch import Tensor, nn

from kfde_layers.insertion.adapters import Key, items
from kfde_layers.insertion.joining import CHILD
from kfde_layers.insertion.layouts import declared_grids, layout_of_map, layout_of_tokens
from kfde_layers.insertion.running import Trial, check_unwrapped, example_for


class Point(NamedTuple):
    """A feature map after which `insert` can put a block."""

    channels: int
    """C of the map."""
    reduction: int
    """Factor by which the image has shrunk to the map."""
    layout: str
    """Order of the map's dimensions: "NCHW", "NHWC", or "NLC" for a sequence of tokens."""
    num_prefix_tokens: int = 0
    """Number of tokens of a sequence that precede those of the map."""


class Seen(NamedTuple):
    """A point, and its map in one forward pass."""

    point: Point
    """The point."""
    key: Key | None
    """Key of the map within the module's output; None if the output is the map."""
    output: Tensor
    """The map, in the layout in which the module returned it."""
    map_size: tuple[int, int]
    """Height and width of the map."""


def insertion_points(model: nn.Module, *, example_input: Tensor | None = None) -> dict[str, Point]:
    """Find where `insert` can put a block.

    Args:
        model: Left unchanged, except that lazy modules take their shapes. In a timm model, the points are the modules
            that it lists in `feature_info`; in any other model, and if the forward pass calls none of these, all
            submodules.
        example_input: Image (N, C, H, W) to run the model on, without autocast and in eval mode. None
            makes one of noise, of the size that the model's `pretrained_cfg` gives (else 224 px), with the model's
            `in_chans` (else the channels of the first convolution).

    Returns:
        The points by module name, in the order of the forward pass: the modules that it calls exactly once and that
        return a feature map, (N, C, H, W), (N, H, W, C) or tokens (N, L, C), alone or as the first feature map of a
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
    trial = Trial(model, example_for(model, example_input))
    declared: Any = getattr(model, "feature_info", None)
    seen: dict[str, Seen | str] = {}
    if isinstance(declared, list):
        seen = probe(trial, dict.fromkeys(info["module"] for info in declared))
    if not any(isinstance(result, Seen) for result in seen.values()):
        names = [name for name, _ in model.named_modules() if name and CHILD not in name.split(".")]
        seen = probe(trial, names)
    return {name: result.point for name, result in seen.items() if isinstance(result, Seen)}


def probe(trial: Trial, names: Iterable[str]) -> dict[str, Seen | str]:
    """Run a model once and look at the outputs of the named modules.

    Returns:
        For each name, the map that was seen, or the reason why the module is no point; in the order of the calls.
    """
    modules = dict(trial.model.named_modules(remove_duplicate=False))
    outputs: dict[str, list[Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs.setdefault(name, []).append(output)

        return hook

    named = {name: modules.get(name) if name else None for name in names}
    trial.run([(module, keep(name)) for name, module in named.items() if module is not None])
    conventions = _conventions_of(trial.model, trial.example)
    seen = {name: _look_at(modules[name], calls, trial.example, conventions) for name, calls in outputs.items()}
    for name, module in named.items():
        if module is None:
            close = ", ".join(map(repr, get_close_matches(name, modules))) or "none"
            seen[name] = f"the model has no submodule of that name; close to it: {close}"
    return seen | {name: "the forward pass does not call it" for name in named if name not in seen}


def reason_children_are_special(module: nn.Module) -> str:
    """Say why a container that does not run its children in sequence cannot take a block."""
    return f"{type(module).__name__} does not run its children in sequence, and would use the block like one of them"


class _Conventions(NamedTuple):
    """How a model orders the dimensions and the tokens of its maps."""

    usual_order: str
    """Order of the dimensions of its maps, "NCHW" or "NHWC"."""
    num_prefix_tokens: int | None
    """Number of tokens before those of the map; None if the model does not declare it."""
    tokens_in_rows: bool
    """Whether tokens follow the rows of the image."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of tokens that its modules declare for the image."""


def _conventions_of(model: nn.Module, example: Tensor) -> _Conventions:
    # a model may wrap the one that declares its prefix tokens
    declared: Any = next((m.num_prefix_tokens for m in model.modules() if hasattr(m, "num_prefix_tokens")), None)
    # Hiera sorts its tokens into mask units, and sorts them back ("reroll") only for the features that it returns
    tokens_in_rows = not any(hasattr(module, "reroll") for module in model.modules())
    image = (example.shape[-2], example.shape[-1])
    grids = tuple(grid for module in model.modules() for grid in declared_grids(module, image))
    return _Conventions(getattr(model, "output_fmt", "NCHW"), declared, tokens_in_rows, grids)


def _look_at(module: nn.Module, outputs: list[Any], example: Tensor, conventions: _Conventions) -> Seen | str:
    """Return the first map in what a module returned, or the reason why the module is no point."""
    if hasattr(module, CHILD):
        return "it already holds a block"
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return reason_children_are_special(module)
    if len(outputs) > 1:
        return f"the forward pass calls it {len(outputs)} times, and each call would run the same block"
    output = outputs[0]
    values: dict[Key | None, Any] = {None: output} if isinstance(output, Tensor) else {**items(output)}
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    image = (example.shape[-2], example.shape[-1])
    for key, tensor in tensors.items():
        shape, layout = tuple(tensor.shape), None
        if not tensor.is_floating_point() or shape[:1] != tuple(example.shape[:1]):
            continue
        if tensor.ndim == 4:
            layout = layout_of_map(shape, image, conventions.usual_order)
        elif tensor.ndim == 3:
            if not conventions.tokens_in_rows:
                return "its tokens are sorted into mask units, not by rows of the image"
            layout = layout_of_tokens(shape[1], image, conventions.num_prefix_tokens, conventions.grids)
        if isinstance(layout, str):
            return layout
        if layout is not None:
            channels = shape[1] if layout.order == "NCHW" else shape[-1]
            point = Point(channels, layout.reduction, layout.order, layout.num_prefix_tokens)
            return Seen(point, key, tensor, layout.map_size)
    returned = " and ".join(f"{tensor.dtype} of shape {tuple(tensor.shape)}" for tensor in tensors.values())
    return (
        "it returns no feature map of the input, (N, C, H, W), (N, H, W, C) or tokens (N, L, C), "
        f"but {returned or type(output).__name__}"
    )
