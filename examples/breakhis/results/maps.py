"""Grad-CAM over the whole field: what a model saw, what it answered, and where it looked."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.patches import Rectangle
from PIL import Image
from timm.data.transforms import CenterCropOrPad
from torchvision.transforms import CenterCrop, Compose

from breakhis.results.canvas import DPI, Heading, add_axes, add_heading, heading_height, write

_FIELD_PX = (700, 2000)  # least and largest long side of a drawn field; one between them is drawn pixel by pixel
_GAP = 0.12  # inches between panels
_PANEL_DPI = 225
_PANEL = 700 / _PANEL_DPI  # width of a panel in inches: a field of 700 px is drawn pixel by pixel
_MAX_PX = 60_000  # matplotlib draws less than 65536 px
_UNIT = "Grad-CAM, logit"
_COLOURS = colormaps["viridis"](np.linspace(0, 1, 256))
_COLOURS[:, 3] = np.linspace(0, 0.65, 256)  # clear where the map is 0, and the tissue is always seen
COLOURS = ListedColormap(_COLOURS, "clear to viridis")
"""Colours of a map: as it grows, from clear over blue and green to yellow, which tissue does not have."""


class Box(NamedTuple):
    """A part of a field, in px from the field's upper left corner."""

    left: float
    top: float
    right: float
    bottom: float


class SeenMap(NamedTuple):
    """The Grad-CAM of a model for one image, and where it lies in the field."""

    cells: np.ndarray
    """Values of the feature map's cells, (h, w), at least 0."""
    size: tuple[int, int]
    """Width and height of the field in px."""
    seen: Box
    """The part of the field that the model saw; the cells divide it evenly."""

    @property
    def share(self) -> float:
        """Share of the field that the model saw."""
        (width, height), (left, top, right, bottom) = self.size, self.seen
        return (min(right, width) - max(left, 0)) * (min(bottom, height) - max(top, 0)) / (width * height)

    @property
    def is_framed(self) -> bool:
        """Whether the model did not see all of the field."""
        return self.share < 0.999  # the last pixel row may be lost to rounding


class MapPanel(NamedTuple):
    """The answer of one model for one image."""

    map: SeenMap
    """Where the model looks."""
    answer: str
    """The prediction and its probability."""
    explained: str
    """The class that the map explains, and its probability."""
    wrong: bool
    """Whether the prediction is wrong."""


class MapRow(NamedTuple):
    """One image of `draw_map_panels`."""

    label: str
    """Class and origin of the image."""
    field: Image.Image
    """The whole field, at any resolution."""
    panels: dict[str, MapPanel]
    """The answer of each model, by the model's name. Every row has the same models."""


def seen_part(transform: Compose, size: tuple[int, int]) -> Box:
    """Find the part of a field that a transform for evaluation gives to the model.

    Args:
        transform: A transform of timm: resizing and centre crops, then a tensor.
        size: Width and height of the field in px.
    """
    image, corner, scale = Image.new("RGB", size), np.zeros(2), np.ones(2)
    for step in transform.transforms:
        result = step(image)
        if not isinstance(result, Image.Image):
            break  # from here on only the numbers change
        before, after = np.array(image.size), np.array(result.size)
        if isinstance(step, CenterCrop | CenterCropOrPad):
            corner += scale * np.round((before - after) / 2)
        else:
            scale *= before / after
        image = result
    return Box(*corner.tolist(), *(corner + scale * image.size).tolist())


def largest(maps: Iterable[np.ndarray]) -> float:
    """Return the largest value of several maps, the upper end of their common scale; 1 if all values are 0."""
    return max((float(cells.max()) for cells in maps), default=0) or 1.0


def describe_map(shown: SeenMap) -> str:
    """Say how fine a map is, and how much of the field the model saw."""
    cells = f"map of {shown.cells.shape[0]} x {shown.cells.shape[1]} cells"
    return (
        f"{cells}, frame: all that the network saw ({100 * shown.share:.0f} % of the field)"
        if shown.is_framed
        else cells
    )


def describe_maps(maps: Iterable[SeenMap]) -> str:
    """Say the same of several maps, each kind once."""
    return "; ".join(dict.fromkeys(map(describe_map, maps)))


def draw_map(field: Image.Image, shown: SeenMap, scale: float, heading: Heading, path: Path) -> None:
    """Draw the Grad-CAM of one image over the whole field.

    Args:
        field: The image; one of 700 to 2000 px is drawn pixel by pixel, a smaller or larger one is resized to that.
        shown: The map.
        scale: Value at the upper end of the colours.
        heading: The answer, and the image's name; what the map and the frame are is added.
        path: The PNG file.
    """
    zoom = np.clip(max(field.size), *_FIELD_PX) / max(field.size)
    pixels = [max(1, round(side * zoom)) for side in field.size]
    if zoom < 1:
        field = field.resize(tuple(pixels))
    subtitle = f"{heading.subtitle}, {describe_map(shown)}"
    heading = heading._replace(subtitle=subtitle if shown.cells.any() else f"{subtitle}, no cell speaks for this class")
    width, height = (side / DPI for side in pixels)
    whole_width = max(width, _FIELD_PX[0] / DPI) + 2 * _GAP + 0.75  # for the scale
    top, bar_height = round(heading_height(heading, whole_width) * DPI) / DPI, max(height, 1.2)
    figure = plt.figure(figsize=(whole_width, top + bar_height + _GAP), dpi=DPI)
    norm = Normalize(0, scale)
    _draw_field(add_axes(figure, _GAP, top, width, height), field, shown, norm)
    bar = add_axes(figure, 2 * _GAP + width, top, 0.1, bar_height)
    figure.colorbar(ScalarMappable(norm, COLOURS), cax=bar).set_label(_UNIT, size="small")
    bar.tick_params(labelsize="x-small")
    add_heading(figure, heading)
    write(figure, heading, path)


def draw_map_panels(rows: Sequence[MapRow], heading: Heading, path: Path) -> None:
    """Draw fields and the Grad-CAM of each model next to them, arranged as in the paper's Figure 2, on one scale.

    Args:
        rows: At least one image, each with the same models.
        heading: What is shown and by which protocol.
        path: The PNG file.
    """
    names = ["whole field", *rows[0].panels]
    lefts = [0.55 + number * (_PANEL + _GAP) for number in range(len(names))]
    width = lefts[-1] + _PANEL + _GAP
    heights = [_PANEL * row.field.height / row.field.width for row in rows]
    tops = heading_height(heading, width) + 0.25 + np.cumsum([0, *(height + 0.55 for height in heights)])
    figure = plt.figure(figsize=(width, tops[-1] + 0.6))
    norm = Normalize(0, largest(panel.map.cells for row in rows for panel in row.panels.values()))
    for row, top, height in zip(rows, tops[:-1], heights, strict=True):
        first, *rest = [add_axes(figure, left, top, _PANEL, height) for left in lefts]
        first.imshow(row.field, aspect="auto")
        first.set_ylabel(row.label)
        for axes, panel in zip(rest, row.panels.values(), strict=True):
            _draw_field(axes, row.field, panel.map, norm)
            mark = {"color": "firebrick", "weight": "bold"} if panel.wrong else {}
            axes.set_xlabel(f"{panel.answer}\n{panel.explained}", fontsize="small", linespacing=1.4, **mark)
    for axes, name in zip(figure.axes, names, strict=False):  # the first row
        axes.set_title(name, fontsize="medium", weight="bold")
    bar = add_axes(figure, 0.55, tops[-1], _PANEL, 0.12)
    figure.colorbar(ScalarMappable(norm, COLOURS), cax=bar, orientation="horizontal").set_label(_UNIT, size="small")
    bar.tick_params(labelsize="small")
    add_heading(figure, heading)
    write(figure, heading, path, min(_PANEL_DPI, _MAX_PX / max(figure.get_size_inches())))


def _draw_field(axes: Axes, field: Image.Image, shown: SeenMap, norm: Normalize) -> None:
    """Draw a field into axes of its shape, the cells of a map, and a frame if the model did not see the whole field."""
    (left, top, right, bottom), (width, height) = shown.seen, shown.size
    axes.imshow(field, extent=(0, width, height, 0), aspect="auto")
    cells = {"extent": (left, right, bottom, top), "interpolation": "nearest", "aspect": "auto"}
    axes.imshow(shown.cells, COLOURS, norm, **cells)
    if shown.is_framed:
        edge = [patheffects.withStroke(linewidth=3, foreground="black")]
        frame = {"fill": False, "edgecolor": "white", "linewidth": 1.5, "path_effects": edge, "clip_on": False}
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, **frame))
    axes.set(xlim=(0, width), ylim=(height, 0))
