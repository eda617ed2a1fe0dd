"""The frame of every figure: its heading, the look of its classes, and its file."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only; a training machine has no screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from breakhis.files import write_atomically
from breakhis.names import printable

plt.rcParams["text.parse_math"] = False  # a name with two $ is no formula

DPI = 150
_TITLE = {"size": 11, "weight": "bold", "line": 0.2, "letters": 10.5}
_SUBTITLE = {"size": 8.5, "weight": "normal", "line": 0.16, "letters": 14}
"""Font in points, height of a line in inches, and letters that fit into an inch, with some to spare."""
_MARGIN = 0.12  # inches around the heading
_COLOURS = [f"C{index}" for index in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # C7 is the grey of reference lines
_MARKERS = "os^vDPX*p"


class Heading(NamedTuple):
    """The text above a figure. Its parts end with a comma or a semicolon: lines break there."""

    title: str
    """What the figure shows."""
    subtitle: str
    """The protocol, and the numbers of images and patients."""


def class_style(index: int) -> dict[str, str]:
    """Return colour and marker of a class by its index, the same in every figure."""
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}


def wrap(text: str, letters: int) -> list[str]:
    """Break a text into lines after commas and semicolons that stand in no bracket, elsewhere only if it must be."""
    lines: list[str] = []
    for phrase in re.split(r"(?<=[,;]) (?![^(]*\))", printable(text)):
        if lines and len(lines[-1]) + 1 + len(phrase) <= letters:
            lines[-1] += f" {phrase}"
        else:
            lines += textwrap.wrap(phrase, letters)
    return lines


def heading_height(heading: Heading, width: float) -> float:
    """Return the height that a heading takes in a figure of a width, both in inches."""
    return 2 * _MARGIN + sum(
        font["line"] * len(wrap(text, int(font["letters"] * (width - 2 * _MARGIN))))
        for text, font in zip(heading, (_TITLE, _SUBTITLE), strict=True)
    )


def add_heading(figure: Figure, heading: Heading) -> None:
    """Write a heading at the top of a figure, which must have room for it."""
    width, height = figure.get_size_inches()
    top = height - _MARGIN
    for text, font in zip(heading, (_TITLE, _SUBTITLE), strict=True):
        lines = wrap(text, int(font["letters"] * (width - 2 * _MARGIN)))
        for number, line in enumerate(lines):
            y = (top - number * font["line"]) / height
            figure.text(_MARGIN / width, y, line, va="top", size=font["size"], weight=font["weight"], in_layout=False)
        top -= font["line"] * len(lines)


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes without ticks to a figure, placed in inches from its upper left corner."""
    whole_width, whole_height = figure.get_size_inches()
    bottom = whole_height - top - height
    place = (left / whole_width, bottom / whole_height, width / whole_width, height / whole_height)
    return figure.add_axes(place, xticks=[], yticks=[])


def save(figure: Figure, heading: Heading, path: Path, dpi: float = DPI) -> None:
    """Make a figure higher by its heading, and write it; its layout must be "constrained"."""
    height = figure.get_figheight()
    whole = height + heading_height(heading, figure.get_figwidth())
    figure.set_figheight(whole)
    figure.get_layout_engine().set(rect=(0, 0, 1, height / whole), w_pad=_MARGIN, h_pad=_MARGIN / 2)
    add_heading(figure, heading)
    write(figure, heading, path, dpi)


def write(figure: Figure, heading: Heading, path: Path, dpi: float = DPI) -> None:
    """Write a figure as PNG and close it. The heading becomes the file's own description, for those who cannot see."""
    metadata = {"Title": printable(heading.title), "Description": printable(heading.subtitle)}
    try:
        write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=dpi, metadata=metadata))
    finally:
        plt.close(figure)
