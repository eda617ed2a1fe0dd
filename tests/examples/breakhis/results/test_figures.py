import itertools

import numpy as np
import pytest
from breakhis.results.figures import (
    CamCell,
    CamRow,
    draw_branch_weights,
    draw_calibration,
    draw_cam_panels,
    draw_confusion_matrix,
    draw_curves,
    draw_gates,
    draw_roc,
)
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from tests.support.runs import BINARY, SUBTYPES

TITLE = "synthetic images, image protocol (70/30, patients leak), mean over 40X, 100X, 200X and 400X, 5 folds, subtype"


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Call a drawing function, check its file, and return the figure."""
    saved = []
    savefig = Figure.savefig

    def keep(figure, *args, **arguments):
        saved.append(figure)
        return savefig(figure, *args, **arguments)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(function, *args, **arguments):
        function(*args, **arguments, title=TITLE, path=tmp_path / "figure.png")
        (figure,) = saved
        with Image.open(tmp_path / "figure.png") as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
        assert plt.get_fignums() == []  # closed
        assert " ".join(figure.get_suptitle().split()).startswith(TITLE)
        assert_inside(figure)
        return figure

    return draw


def assert_inside(figure):
    """Check that nothing lies outside of the picture, and that no panel touches the title or another panel."""
    figure.set_layout_engine("none")  # a second layout could differ from the file
    figure.set_dpi(150)
    boxes = [figure._suptitle.get_window_extent(), *(axes.get_tightbbox() for axes in figure.axes)]
    outer = figure.bbox.padded(1)
    assert all(outer.contains(*corner) for box in boxes for corner in (box.min, box.max))
    assert not any(first.padded(-1).overlaps(second) for first, second in itertools.combinations(boxes, 2))


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def random_predictions(count: int, classes: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(classes, size=count)
    logits = rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[targets]
    return targets, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def area(targets, scores) -> float:
    """Compute the area under the ROC curve: the share of pairs in the right order."""
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[targets] for n in scores[~targets]]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("classes", [BINARY, SUBTYPES])
def test_confusion_matrix(drawn, classes):
    matrix = np.arange(len(classes) ** 2).reshape(len(classes), -1) * 20
    matrix[0] = 0  # an absent class
    (axes,) = drawn(draw_confusion_matrix, matrix.tolist(), classes).axes
    assert [int(text.get_text()) for text in axes.texts] == matrix.flatten().tolist()
    assert [label.get_text() for label in axes.get_yticklabels()] == classes


def test_curves(drawn):
    history = [
        {"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 2 / epoch, "val_balanced_accuracy": 0.1 * epoch}
        for epoch in range(1, 6)
    ]
    losses, scores = drawn(draw_curves, history, 4).axes
    assert legend(losses) == ["train loss", "val loss", "best, epoch 4"]
    assert legend(scores) == ["val balanced accuracy", "best, epoch 4"]


def test_roc_of_two_classes_is_one_curve(drawn):
    targets, probabilities = random_predictions(60, 2)
    (axes,) = drawn(draw_roc, targets, probabilities, BINARY).axes
    expected = area(targets == 1, probabilities[:, 1])
    assert legend(axes) == [f"malignant (AUC = {expected:.2f})", "chance (AUC = 0.50)"]


def test_roc_of_many_classes_has_their_mean(drawn):
    targets, probabilities = random_predictions(300, 8)
    (axes,) = drawn(draw_roc, targets, probabilities, SUBTYPES).axes
    areas = [area(targets == index, probabilities[:, index]) for index in range(8)]
    *labels, macro, chance = legend(axes)
    assert labels == [f"{name} (AUC = {value:.2f})" for name, value in zip(SUBTYPES, areas, strict=True)]
    assert macro == f"macro average (AUC = {np.mean(areas):.2f})"
    assert chance == "chance (AUC = 0.50)"
    x, y = next(line for line in axes.lines if line.get_label() == macro).get_data()
    assert np.trapezoid(y, x) == pytest.approx(np.mean(areas), abs=0.02)


def test_roc_names_absent_classes(drawn):
    targets, probabilities = random_predictions(200, 8)
    present = np.isin(targets, [0, 4])
    (axes,) = drawn(draw_roc, targets[present].tolist(), probabilities[present].tolist(), SUBTYPES).axes
    labels = legend(axes)
    assert [label for label in labels if label.endswith("no image")] == [
        f"{name}: no image" for name in ("F", "PT", "TA", "LC", "MC", "PC")
    ]
    assert [label.split(" (")[0] for label in labels if "AUC" in label] == ["A", "DC", "macro average", "chance"]


@pytest.mark.parametrize(("target", "label"), [(0, "malignant: no image"), (1, "malignant: every image")])
def test_roc_of_one_class_has_no_curve(drawn, target, label):
    (axes,) = drawn(draw_roc, [target] * 5, [[0.3, 0.7]] * 5, BINARY).axes
    assert legend(axes) == [label, "chance (AUC = 0.50)"]


@pytest.mark.parametrize("classes", [2, 8])
def test_calibration_counts_every_image_once(drawn, classes):
    targets, probabilities = random_predictions(400, classes)
    figure = drawn(draw_calibration, targets, probabilities)
    curve, counts = figure.axes
    assert sum(patch.get_height() for patch in counts.patches) == 400
    confidences, shares = curve.lines[1].get_data()
    weights = [patch.get_height() for patch in counts.patches if patch.get_height()]
    hits = probabilities.argmax(1) == targets
    assert np.average(shares, weights=weights) == pytest.approx(hits.mean())
    assert np.average(confidences, weights=weights) == pytest.approx(probabilities.max(1).mean())
    error = np.average(np.abs(shares - confidences), weights=weights)
    assert f"expected calibration error {error:.3f} on 400 images" in " ".join(figure.get_suptitle().split())


def test_calibration_of_a_model_that_is_always_right(drawn):
    curve, _ = drawn(draw_calibration, [0, 0, 0], [[0.9, 0.1], [0.8, 0.2], [1.0, 0.0]]).axes
    assert set(curve.lines[1].get_ydata()) == {1}


def test_calibration_of_a_model_that_is_never_right(drawn):
    curve, _ = drawn(draw_calibration, [1, 1], [[0.9, 0.1], [0.8, 0.2]]).axes
    assert set(curve.lines[1].get_ydata()) == {0}


def test_cam_panels(drawn):
    picture = Image.new("RGB", (48, 48), "pink")
    rows = [
        CamRow(
            f"{name}, 100X", picture, {"baseline": CamCell(picture, "DC", 0.25), "KFDE": CamCell(picture, name, 0.875)}
        )
        for name in ("A", "PC", "DC")
    ]
    figure = drawn(draw_cam_panels, rows)
    panels = np.array(figure.axes).reshape(3, 3)
    assert [axes.get_title() for axes in panels[0]] == ["image", "baseline", "KFDE"]
    assert [axes.get_ylabel() for axes in panels[:, 0]] == ["A, 100X", "PC, 100X", "DC, 100X"]
    assert [axes.get_xlabel() for axes in panels[1]] == ["", "DC, p = 0.25", "PC, p = 0.88"]


def test_a_single_cam_row_of_one_model(drawn):
    picture = Image.new("RGB", (48, 48), "pink")
    figure = drawn(draw_cam_panels, [CamRow("malignant, 400X", picture, {"KFDE": CamCell(picture, "malignant", 1.0)})])
    assert len(figure.axes) == 2


@pytest.mark.parametrize("classes", [BINARY, SUBTYPES])
def test_gates(drawn, classes):
    shares = np.random.default_rng(0).uniform(size=(len(classes), 320))
    shares[0] = np.nan
    (axes,) = drawn(draw_gates, shares, classes).axes
    assert legend(axes) == [f"{classes[0]}: no image", *classes[1:], "start, on symmetric maps"]
    *lines, start = axes.lines
    assert set(start.get_ydata()) == {0.5}
    for line, row in zip(lines[1:], shares[1:], strict=True):
        assert line.get_ydata().tolist() == sorted(row, reverse=True)


@pytest.mark.parametrize("classes", [BINARY, SUBTYPES])
def test_branch_weights(drawn, classes):
    means = np.random.default_rng(0).dirichlet([20] * 4, size=len(classes))
    means[-1] = np.nan
    branches = [f"{size} x {size} px" for size in (1, 3, 5, 7)]
    (axes,) = drawn(draw_branch_weights, means, 0.1 * means, branches, classes).axes
    assert set(legend(axes)) == {*classes[:-1], f"{classes[-1]}: no image", "uniform, 1/4"}
    heights = np.array([bar.get_height() for bar in axes.patches]).reshape(len(classes), 4)
    np.testing.assert_array_equal(heights, means)
    assert [label.get_text() for label in axes.get_xticklabels()] == branches
    edges = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert all(b >= a - 1e-9 for (_, a), (b, _) in zip(sorted(edges), sorted(edges)[1:], strict=False))  # side by side


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_figure_is_written_completely_or_not_at_all(tmp_path, monkeypatch, error):
    (tmp_path / "figure.png").write_text("old")

    def write_half(figure, path, **arguments):
        path.write_text("half")
        raise error("stopped")

    monkeypatch.setattr(Figure, "savefig", write_half)
    with pytest.raises(error, match="stopped"):
        draw_confusion_matrix([[1, 0], [0, 1]], BINARY, TITLE, tmp_path / "figure.png")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("figure.png", "old")]
    assert plt.get_fignums() == []  # closed
