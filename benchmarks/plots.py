"""Figures of results as SVG: the same bytes for the same result, readable on light and on dark.

matplotlib is imported when a figure is drawn, so that all other parts work without it.
"""

import io
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.schema import Result, Row, best

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#808080"
STYLE = {
    "svg.hashsalt": "kfde-layers",
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "legend.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": GREY,
}
# Least number of tensors that memory reads or writes: x and y; with backward also x again, the gradients of y and x.
CROSSINGS = {"forward": 2, "forward+backward": 5}
DRAWN = [("CFE", "auto"), ("SFE", "auto"), ("CSFE", "auto"), ("CSFE", "textbook"), ("MFDF", "auto"), ("floor", "copy")]


def bandwidth(result: Result) -> bytes:
    """Draw a roofline: the bytes that a pass must move at least, over its time; a copy is measured for comparison."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = result["rows"]
    works = list(dict.fromkeys(row["work"] for row in rows))
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * len(layouts), 3.2 * len(works)), layout="constrained")
        grid = figure.subplots(len(works), len(layouts), squeeze=False, sharex=True, sharey="row")
        for axes_row, work in zip(grid, works, strict=True):
            for axes, layout in zip(axes_row, layouts, strict=True):
                panel_rows = [row for row in rows if (row["work"], row["layout"]) == (work, layout)]
                _draw_bandwidth(axes, panel_rows, shapes)
                axes.set(title=f"{work}, {layout}", yscale="log")
                axes.grid(visible=True)
            axes_row[0].set_ylabel("GB/s")
        _legend(figure, grid[0][0])
        return _svg(figure)


def cost(result: Result) -> bytes:
    """Draw time against map size, channels and batch, each varied alone: forward solid, with backward dashed."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["candidate"] != "sigmoid"]
    base = [statistics.mode(sizes) for sizes in zip(*(row["shape"] for row in rows), strict=True)]
    dimensions = {"map side, px": (2, 3), "channels": (1,), "batch": (0,)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (name, varied) in zip(panels, dimensions.items(), strict=True):
            panel_rows = [row for row in rows if all(row["shape"][i] == base[i] for i in range(4) if i not in varied)]
            _draw_cost(axes, panel_rows, varied[0])
            axes.set(xlabel=name, xscale="log", yscale="log")
            sizes = sorted({row["shape"][varied[0]] for row in panel_rows})
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set_xticks([], minor=True)
            axes.grid(visible=True)
        panels[0].set_ylabel("ms")
        _legend(figure, panels[0])
        return _svg(figure)


def _draw_bandwidth(axes: "Axes", rows: Sequence[Row], shapes: Sequence[tuple[int, ...]]) -> None:
    for subject, candidate in DRAWN:
        points = [
            (shapes.index(tuple(row["shape"])), _gigabytes_per_second(row))
            for row in rows
            if (row["subject"], row["candidate"]) == (subject, candidate)
        ]
        if points:
            style = "--" if subject == "floor" else "-"
            axes.plot(*zip(*points, strict=True), style, marker="o", label=_label(subject, candidate))
    axes.set_xticks(range(len(shapes)), [" x ".join(map(str, shape)) for shape in shapes], fontsize=7)


def _draw_cost(axes: "Axes", rows: Sequence[Row], dimension: int) -> None:
    keys = list(dict.fromkeys((row["subject"], row["candidate"], row["work"]) for row in rows))
    colours = {key: f"C{index}" for index, key in enumerate(dict.fromkeys(key[:2] for key in keys))}
    for subject, candidate, work in keys:
        if subject == "floor" and work != "forward":
            continue  # the copy is the same in both passes
        points = sorted(
            (row["shape"][dimension], best(row["ms"])["median"])
            for row in rows
            if (row["subject"], row["candidate"], row["work"]) == (subject, candidate, work)
        )
        style = "-" if work == "forward" else "--"
        label = f"{_label(subject, candidate)}, {work}"
        axes.plot(*zip(*points, strict=True), style, marker="o", color=colours[subject, candidate], label=label)


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=7)


def _gigabytes_per_second(row: Row) -> float:
    crossings = 2 if row["subject"] == "floor" else CROSSINGS[row["work"]]
    return crossings * row["input_bytes"] / best(row["ms"])["median"] / 1e6


def _label(subject: str, candidate: str) -> str:
    return candidate if subject == "floor" else f"{subject} {candidate}"


def _svg(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()
