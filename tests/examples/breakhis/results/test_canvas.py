"""The heading of a figure, its file, and the look of classes."""

import pytest
from breakhis.results.canvas import Heading, class_style, heading_height, save, wrap
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from tests.support.figures import assert_inside


def figure_of(width: float) -> Figure:
    figure, _ = plt.subplots(figsize=(width, 3), layout="constrained")
    return figure


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("patient protocol, fold 0 of 5, breakhis 100X", ["patient protocol,", "fold 0 of 5,", "breakhis 100X"]),
        ("one, two, three, four, five", ["one, two, three,", "four, five"]),
        ("70/30 (patients, leak), 5 folds", ["70/30 (patients,", "leak), 5 folds"]),  # too long for a line
        ("(a, b), c; d", ["(a, b), c; d"]),
        ("x" * 25, ["x" * 20, "x" * 5]),
        ("a\x1b[2J\nb", [r"a\x1b[2J\nb"]),
    ],
)
def test_lines_break_between_phrases(text, lines):
    assert wrap(text, 20) == lines


def test_a_bracket_stays_in_one_line():
    assert wrap("image protocol (70/30, patients leak), fold 0", 40) == [
        "image protocol (70/30, patients leak),",
        "fold 0",
    ]
    assert wrap("one two three four, (five, six seven)", 30) == ["one two three four,", "(five, six seven)"]


@pytest.mark.parametrize("width", [3, 5, 10])
@pytest.mark.parametrize(
    "heading", [Heading("Title", "subtitle"), Heading("long" * 30, "one phrase, " * 30), Heading("", "")]
)
def test_the_plot_keeps_its_height_below_any_heading(tmp_path, width, heading):
    figure = figure_of(width)
    save(figure, heading, tmp_path / "figure.png")
    assert figure.get_figheight() == pytest.approx(3 + heading_height(heading, width))
    assert_inside(figure)
    assert {text.get_text() for text in figure.texts if "," in text.get_text()} == {
        line for line in wrap(heading.subtitle, int(14 * (width - 0.24))) if "," in line
    }


def test_the_file_describes_itself(tmp_path):
    save(figure_of(5), Heading("Confusion", "fold 0, 7 images\x1b"), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as picture:
        assert (picture.info["Title"], picture.info["Description"]) == ("Confusion", r"fold 0, 7 images\x1b")


def test_nine_classes_differ_in_colour_and_marker_and_none_is_grey():
    styles = [class_style(index) for index in range(9)]
    assert len({style["color"] for style in styles}) == len({style["marker"] for style in styles}) == 9
    assert "C7" not in {style["color"] for style in styles}
    assert class_style(9) == class_style(0)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_figure_is_written_completely_or_not_at_all(tmp_path, monkeypatch, error):
    (tmp_path / "figure.png").write_text("old")

    def write_half(figure, path, **arguments):
        path.write_text("half")
        raise error("stopped")

    monkeypatch.setattr(Figure, "savefig", write_half)
    with pytest.raises(error, match="stopped"):
        save(figure_of(5), Heading("Title", "subtitle"), tmp_path / "figure.png")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("figure.png", "old")]
    assert plt.get_fignums() == []  # closed
