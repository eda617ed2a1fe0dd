"""Grad-CAM over whole fields: where it lies, its cells, its scale, and what is said beside it."""

import numpy as np
import pytest
from breakhis.results.canvas import Heading
from breakhis.results.maps import (
    COLOURS,
    Box,
    MapPanel,
    MapRow,
    SeenMap,
    describe_map,
    describe_maps,
    draw_map,
    draw_map_panels,
    largest,
    seen_part,
)
from matplotlib import colormaps
from matplotlib import pyplot as plt
from PIL import Image
from timm.data import create_transform

from tests.support.figures import HEADING, texts_above

FIELD = (700, 460)
CROPPED = Box(120, 0, 580, 460)  # the centre square of such a field
CELLS = np.array([[0.0, 0.1, 0.4], [0.2, 0.0, 0.1]], np.float32)


def make_transform(size: tuple[int, int], crop_pct: float, crop_mode: str):
    """Make timm's transform for evaluation, without normalisation."""
    return create_transform((3, *size), crop_pct=crop_pct, crop_mode=crop_mode, mean=(0, 0, 0), std=(1, 1, 1))


def make_field(size: tuple[int, int] = FIELD) -> Image.Image:
    """Draw a field whose red and green tell the place, from 0 at the left and the top to 1."""
    width, height = size
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.round(255 * np.stack([x, y, 0.5 + 0 * x], axis=2)).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "crop_pct", "crop_mode", "expected"),
    [
        ((224, 224), 1.0, "center", CROPPED),
        ((96, 96), 1.0, "center", CROPPED),
        ((224, 224), 0.875, "center", Box(148.75, 28.75, 551.25, 431.25)),  # 0.875 of 460 is 402.5
        ((224, 224), 1.0, "squash", Box(0, 0, 700, 460)),
        ((224, 224), 1.0, "border", Box(0, -120, 700, 580)),  # with a margin above and below
        ((92, 140), 1.0, "center", Box(0, 0, 700, 460)),
    ],
)
def test_the_part_that_the_network_saw(size, crop_pct, crop_mode, expected):
    seen = seen_part(make_transform(size, crop_pct, crop_mode), FIELD)
    assert seen == pytest.approx(expected, abs=460 / min(size))  # up to one pixel of the network


@pytest.mark.parametrize("field", [(700, 460), (460, 700), (350, 230), (64, 64), (1001, 333)])
@pytest.mark.parametrize(("crop_pct", "crop_mode"), [(1.0, "center"), (0.9, "center"), (0.9, "squash")])
def test_the_network_sees_the_pixels_of_that_part(field, crop_pct, crop_mode):
    """Read the place off the colours of the network's input, without the transform's sizes."""
    transform = make_transform((96, 96), crop_pct, crop_mode)
    red, green, _ = transform(make_field(field)).numpy()
    columns, rows = red.mean(axis=0), green.mean(axis=1)
    inner = slice(8, 88)  # the resizing repeats pixels at the border of the field
    places = (np.arange(96) + 0.5)[inner] / 96
    expected = []
    for values, side in ((columns, field[0]), (rows, field[1])):
        slope, start = np.polyfit(places, side * values[inner], 1)
        expected.append((start, start + slope))
    (left, right), (top, bottom) = expected
    assert seen_part(transform, field) == pytest.approx(Box(left, top, right, bottom), abs=0.012 * max(field))


def test_what_is_said_of_a_map():
    shown = SeenMap(CELLS, FIELD, CROPPED)
    assert shown.share == pytest.approx(460 / 700)
    assert describe_map(shown) == "map of 2 x 3 cells, frame: all that the network saw (66 % of the field)"
    whole = SeenMap(CELLS, FIELD, Box(0, -120, 700, 580))
    assert whole.share == 1
    assert describe_map(whole) == "map of 2 x 3 cells"
    assert describe_maps([shown, shown, whole]) == f"{describe_map(shown)}; map of 2 x 3 cells"


def test_the_common_scale_ends_at_the_largest_value():
    assert largest([CELLS, 2 * CELLS, 0 * CELLS]) == pytest.approx(0.8)
    assert largest([0 * CELLS]) == largest([]) == 1


def test_the_colours_are_clear_at_zero_and_those_of_viridis():
    colours = COLOURS(np.linspace(0, 1, 256))
    np.testing.assert_allclose(colours[:, :3], colormaps["viridis"](np.linspace(0, 1, 256))[:, :3])
    assert colours[0, 3] == 0
    assert (np.diff(colours[:, 3]) >= 0).all()
    assert 0.5 < colours[-1, 3] < 0.8  # the tissue is seen below every value


def images_of(axes):
    """Return field and map of a panel."""
    field, cells = axes.images
    return field, cells


@pytest.mark.parametrize("field", [FIELD, (460, 700), (2000, 90), (90, 700)])
def test_a_field_is_drawn_pixel_by_pixel(drawn, tmp_path, field):
    seen = Box(field[0] * 0.25, 0, field[0] * 0.75, field[1])
    figure = drawn(draw_map, make_field(field), SeenMap(0 * CELLS, field, seen), 1.0)
    with Image.open(tmp_path / "figure.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    box = figure.axes[0].get_window_extent()
    left, top = round(box.x0), round(pixels.shape[0] - box.y1)
    shown = pixels[top : top + field[1], left : left + field[0]]
    frame = 5  # its stroke
    for first, last in ((frame, int(seen.left) - frame), (int(seen.left) + frame, int(seen.right) - frame)):
        expected = np.asarray(make_field(field))[frame:-frame, first:last]
        assert np.abs(shown[frame:-frame, first:last] - expected).max() <= 2


def test_the_map_lies_over_the_part_that_the_network_saw(drawn, tmp_path):
    figure = drawn(draw_map, make_field(), SeenMap(CELLS, FIELD, CROPPED), 0.5)
    axes, bar = figure.axes
    field, cells = images_of(axes)
    assert field.get_extent() == [0, 700, 460, 0]
    assert cells.get_extent() == [120, 580, 460, 0]
    np.testing.assert_array_equal(cells.get_array(), CELLS)  # not enlarged, not stretched
    assert cells.get_interpolation() == "nearest"
    assert cells.get_clim() == (0, 0.5)
    assert bar.get_ylim() == (0, 0.5)
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 700), (460, 0))
    (frame,) = axes.patches
    assert frame.get_bbox().extents.tolist() == [120, 0, 580, 460]
    assert not frame.get_fill()
    with Image.open(tmp_path / "figure.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    box = axes.get_window_extent()
    left, top = round(box.x0), round(pixels.shape[0] - box.y1)
    for (row, column), value in np.ndenumerate(CELLS):
        colour = np.array(COLOURS(value / 0.5))
        tissue = np.asarray(make_field())
        for y in (230 * row + 10, 230 * row + 219):  # the same colour up to the border of a cell
            for x in (120 + 153 * column + 10, 120 + 153 * column + 142):
                expected = 255 * colour[3] * colour[:3] + (1 - colour[3]) * tissue[y, x]
                assert np.abs(pixels[top + y, left + x] - expected).max() <= 3


def test_the_caption_says_what_map_and_frame_are(drawn):
    heading = Heading("Prediction: DC ductal carcinoma, probability 0.53", "a.png")
    figure = drawn(draw_map, make_field(), SeenMap(CELLS, FIELD, CROPPED), 0.5, heading=heading)
    assert texts_above(figure) == (
        "Prediction: DC ductal carcinoma, probability 0.53",
        "a.png, map of 2 x 3 cells, frame: all that the network saw (66 % of the field)",
    )
    figure = drawn(draw_map, make_field(), SeenMap(0 * CELLS, FIELD, Box(0, 0, *FIELD)), 0.5, heading=heading)
    assert texts_above(figure)[1] == "a.png, map of 2 x 3 cells, no cell speaks for this class"
    assert not figure.axes[0].patches  # no frame where the network saw all


@pytest.mark.parametrize("size", [(48, 32), (3, 2), (3001, 17), (17, 3001), (4000, 3000)])
def test_fields_of_any_size_fit(drawn, size):
    figure = drawn(draw_map, make_field(size), SeenMap(CELLS, size, Box(0, 0, *size)), 0.5)
    box = figure.axes[0].get_window_extent()
    assert 700 <= round(max(box.width, box.height)) <= 2000
    field, _ = images_of(figure.axes[0])
    assert field.get_extent() == [0, size[0], size[1], 0]


def make_panel(cells: np.ndarray, wrong: bool) -> MapPanel:
    return MapPanel(
        SeenMap(cells, FIELD, CROPPED), "WRONG: A, p = 0.70" if wrong else "right: DC, p = 0.80", "map of DC", wrong
    )


def test_panels_have_one_scale_and_mark_what_is_wrong(drawn):
    small = make_field((70, 46))  # at another resolution than its coordinates
    rows = [
        MapRow(
            "DC ductal carcinoma", small, {"baseline": make_panel(CELLS, False), "KFDE": make_panel(2 * CELLS, True)}
        ),
        MapRow("A adenosis", small, {"baseline": make_panel(CELLS / 9, True), "KFDE": make_panel(0 * CELLS, False)}),
    ]
    *panels, bar = drawn(draw_map_panels, rows).axes
    panels = np.array(panels).reshape(2, 3)
    assert [axes.get_title() for axes in panels[0]] == ["whole field", "baseline", "KFDE"]
    assert [axes.get_ylabel() for axes in panels[:, 0]] == ["DC ductal carcinoma", "A adenosis"]
    assert bar.get_xlim() == (0, pytest.approx(0.8))
    for row, (first, *rest) in zip(rows, panels, strict=True):
        assert len(first.images) == 1
        for axes, panel in zip(rest, row.panels.values(), strict=True):
            field, cells = images_of(axes)
            assert field.get_extent() == [0, 700, 460, 0]
            assert cells.get_extent() == [120, 580, 460, 0]
            assert cells.get_clim() == (0, pytest.approx(0.8))
            np.testing.assert_array_equal(cells.get_array(), panel.map.cells)
            assert cells.get_interpolation() == "nearest"
            assert axes.get_xlabel() == f"{panel.answer}\n{panel.explained}"
            assert (axes.xaxis.label.get_color() == "firebrick") == panel.wrong
            assert len(axes.patches) == 1


def test_a_single_row_of_one_model_is_as_large_as_its_field(drawn, tmp_path):
    figure = drawn(draw_map_panels, [MapRow("malignant", make_field(), {"KFDE": make_panel(CELLS, False)})])
    assert len(figure.axes) == 3
    with Image.open(tmp_path / "figure.png") as picture:
        zoom = picture.size[0] / figure.bbox.width
    for axes in figure.axes[:2]:
        box = axes.get_window_extent()
        assert (box.width * zoom, box.height * zoom) == (pytest.approx(700, abs=1), pytest.approx(460, abs=1))


def test_many_rows_stay_below_the_largest_picture(tmp_path, monkeypatch):
    written = {}

    def keep(figure, heading, path, dpi):
        written.update(size=figure.get_size_inches(), dpi=dpi)

    monkeypatch.setattr("breakhis.results.maps.write", keep)
    row = MapRow("A", make_field((7, 5)), {"KFDE": make_panel(CELLS, False)})
    draw_map_panels([row] * 120, HEADING, tmp_path / "figure.png")
    plt.close()
    assert max(written["size"]) * written["dpi"] == pytest.approx(60_000)
    assert written["dpi"] < 225
