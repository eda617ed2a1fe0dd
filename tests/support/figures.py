"""Check figures as they are drawn: the objects that matplotlib drew, and the file."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from breakhis.results.canvas import Heading
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

PROTOCOL = (
    "synthetic images, image protocol (70/30, patients leak), mean over 40X, 100X, 200X and 400X, 5 folds, subtype"
)
HEADING = Heading("What is shown, of which layer", f"{PROTOCOL}, 77 test images of 4 patients (3 cases)")


def make_drawer(folder: Path, patch: pytest.MonkeyPatch) -> Callable[..., Figure]:
    """Return a function that calls a drawing function, checks its file, and returns the figure."""
    saved, path = [], folder / "figure.png"
    savefig = Figure.savefig

    def keep(figure, *args, **arguments):
        saved.append(figure)
        return savefig(figure, *args, **arguments)

    patch.setattr(Figure, "savefig", keep)

    def draw(function, *args, heading: Heading = HEADING) -> Figure:
        saved.clear()
        function(*args, heading, path)
        (figure,) = saved
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
            assert picture.info["Title"].startswith(heading.title)
        assert plt.get_fignums() == []  # closed
        title, subtitle = texts_above(figure)
        assert title.startswith(heading.title)
        assert subtitle.startswith(heading.subtitle)
        assert_inside(figure)
        return figure

    return draw


def texts_above(figure: Figure) -> tuple[str, str]:
    """Return title and subtitle of a figure, each in one line."""
    lines = [(text.get_weight(), text.get_text()) for text in figure.texts]
    title, subtitle = ([text for weight, text in lines if (weight == "bold") == bold] for bold in (True, False))
    return " ".join(title), " ".join(subtitle)


def assert_inside(figure: Figure) -> None:
    """Check that nothing lies outside of the picture, and that no panel touches the heading or another panel."""
    figure.set_layout_engine("none")  # a second layout could differ from the file
    figure.set_dpi(150)
    figure.draw_without_rendering()  # texts measured at another resolution are forgotten
    texts = [text.get_window_extent() for text in figure.texts]
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [legend.get_window_extent() for legend in figure.legends]
    outer = figure.bbox.padded(1)
    assert all(outer.contains(*corner) for box in (*texts, *boxes) for corner in (box.min, box.max))
    pairs = [*itertools.combinations(boxes, 2), *itertools.product(texts, boxes)]
    assert not any(first.padded(-1).overlaps(second) for first, second in pairs)


def handles(legend) -> list[str]:
    """Return the texts of a legend."""
    return [text.get_text() for text in legend.get_texts()]
