"""Recognise a feature map in a tensor from the tensor's shape and the size of the image."""

import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from torch import nn

# Before the map there may be no token, a class token, one for distillation too, or a class token and four registers.
_USUAL_PREFIXES = (0, 1, 2, 5)


class Layout(NamedTuple):
    """How a tensor holds a feature map."""

    order: str
    """Order of the dimensions: "NCHW", "NHWC", or "NLC" for a sequence of tokens."""
    reduction: int
    """Factor by which the image has shrunk to the map."""
    map_size: tuple[int, int]
    """Height and width of the map."""
    num_prefix_tokens: int = 0
    """Number of tokens of a sequence that precede those of the map."""


def layout_of_map(shape: tuple[int, ...], image: tuple[int, int], usual_order: str) -> Layout | None:
    """Return the layout of a tensor of four dimensions, or None if it is no map of the image.

    Where both orders fit, the model's usual one wins.
    """
    sizes = {"NCHW": (shape[2], shape[3]), "NHWC": (shape[1], shape[2])}
    layouts = {
        order: Layout(order, reduction, map_size)
        for order, map_size in sizes.items()
        if (reduction := _reduction(image, map_size))
    }
    return layouts.get(usual_order, next(iter(layouts.values()), None))


def declared_grids(module: nn.Module, image: tuple[int, int]) -> list[tuple[int, int]]:
    """Return into how many rows and columns of patches a module says that it cuts an image: in whole patches, or more.

    The module that does so declares the size of a patch (`patch_size`, px), and often the grid for the size of image
    that it was made for (`grid_size`, `img_size`).
    """
    grids = []
    grid, patch = pair_of(module, "grid_size"), pair_of(module, "patch_size")
    if grid is not None and pair_of(module, "img_size") == image:
        grids.append(grid)
    if patch is not None:
        grids.append((image[0] // patch[0], image[1] // patch[1]))
        grids.append((-(-image[0] // patch[0]), -(-image[1] // patch[1])))
    return grids


def pair_of(module: nn.Module, name: str) -> tuple[int, int] | None:
    """Return an attribute that holds one or two positive integers as two, or None."""
    value: Any = None
    with suppress(Exception):  # of a property of the model's own
        value = getattr(module, name, None)
    values = (value, value) if isinstance(value, int) else value
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        return None
    return (values[0], values[1]) if all(isinstance(entry, int) and entry > 0 for entry in values) else None


def layout_of_tokens(
    length: int, image: tuple[int, int], declared_prefix: int | None, grids: Iterable[tuple[int, int]] = ()
) -> Layout | str | None:
    """Return the layout of a sequence of `length` tokens.

    Args:
        length: Number of tokens, those before the map included.
        image: Height and width of the image, px.
        declared_prefix: Number of prefix tokens that the model declares, if it does.
        grids: Rows and columns of tokens that the model declares.

    Returns:
        The layout; the reason if there are several; None if the tokens cannot be a map of the image.
    """
    for height, width in grids:
        prefix = length - height * width
        if prefix == declared_prefix or (declared_prefix is None and prefix in _USUAL_PREFIXES):
            mean = round(math.sqrt(math.prod(image) / (height * width)))  # for patches that are no squares
            return Layout("NLC", _reduction(image, (height, width)) or max(1, mean), (height, width), prefix)
    layouts = {
        prefix: Layout("NLC", reduction, map_size, prefix)
        for prefix in (_USUAL_PREFIXES if declared_prefix is None else {declared_prefix, *_USUAL_PREFIXES})
        if (map_size := _size_in_patches(image, length - prefix)) and (reduction := _reduction(image, map_size))
    }
    if declared_prefix in layouts:
        return layouts[declared_prefix]
    if len(layouts) > 1:
        return (
            f"its {length} tokens may be a map after {' or '.join(map(str, layouts))} prefix tokens; try a square "
            "example_input, or one of another size"
        )
    return next(iter(layouts.values()), None)


def _size_in_patches(image: tuple[int, int], number: int) -> tuple[int, int] | None:
    """Return how many square patches lie along each side, if `number` patches cover the image or fit into it."""
    height, width = image
    for side in range(1, max(image) + 1):
        for map_size in ((height // side, width // side), (-(-height // side), -(-width // side))):
            if math.prod(map_size) == number > 0:
                return map_size
    return None


def _reduction(image: tuple[int, int], map_size: tuple[int, int]) -> int | None:
    """Return the factor by which an image has shrunk to a map, or None if height and width disagree.

    A side of n px becomes n / r, rounded up or down, so that one side gives r only to within an interval. Of the whole
    numbers that both sides allow, a power of two is the likeliest.
    """
    low = max(pixels / (length + 1) for pixels, length in zip(image, map_size, strict=True))
    high = min(
        pixels / (length - 1) if length > 1 else math.inf for pixels, length in zip(image, map_size, strict=True)
    )
    if not low < high:
        return None
    mean = math.sqrt(math.prod(image) / math.prod(map_size))
    power = 2 ** math.ceil(math.log2(low))
    return power if low < power < high else max(1, round(mean))
