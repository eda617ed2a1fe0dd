"""The figures of a run's scores, by the objects that are drawn."""

import numpy as np
import pytest
from breakhis.data.naming import full_names
from breakhis.results.figures import draw_calibration, draw_confusion_matrix, draw_curves, draw_roc
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from tests.support.figures import handles, texts_above
from tests.support.runs import BINARY, SUBTYPES


def random_predictions(count: int, classes: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(classes, size=count)
    logits = rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[targets]
    return targets, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def area(targets, scores) -> float:
    """Compute the area under the ROC curve: the share of pairs in the right order."""
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[targets] for n in scores[~targets]]
    return sum(pairs) / len(pairs)


def luminance(colour) -> float:
    """Compute the relative luminance of WCAG."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(colour)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("classes", [BINARY, SUBTYPES])
def test_confusion_matrix(drawn, classes):
    matrix = np.arange(len(classes) ** 2).reshape(len(classes), -1) * 20
    matrix[0] = 0  # an absent class
    axes, bar = drawn(draw_confusion_matrix, matrix.tolist(), classes).axes
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)
    expected = [f"{n}\n{share:.2f}" if n else "0" for n, share in zip(matrix[1:].flat, shares[1:].flat, strict=True)]
    assert [text.get_text() for text in axes.texts] == [""] * len(classes) + expected
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), shares)
    assert image.get_clim() == (0, 1)
    assert bar.get_ylim() == (0, 1)
    counts = ["no image", *(f"n = {row.sum()}" for row in matrix[1:])]
    labels = [f"{name}, {count}" for name, count in zip(full_names(classes), counts, strict=True)]
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
    assert [label.get_text() for label in axes.get_xticklabels()] == classes
    (hatched,) = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]
    assert hatched.get_bbox().bounds == (-0.5, -0.5, len(classes), 1)  # the row of the absent class


def test_numbers_in_the_confusion_matrix_can_be_read(drawn):
    matrix = [[share, 1000 - share] for share in range(0, 1000, 25)]
    matrix = [row + [0] * (len(matrix) - 2) for row in matrix]
    axes, _ = drawn(draw_confusion_matrix, matrix, [f"class {index}" for index in range(len(matrix))]).axes
    for text in axes.texts:
        column, row = (round(value) for value in text.get_position())
        cell = axes.images[0].to_rgba(matrix[row][column] / 1000)
        lighter, darker = sorted((luminance(cell[:3]), luminance(text.get_color())), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def make_history(epochs: int, score=lambda epoch: 0.1 * epoch) -> list[dict[str, float]]:
    scores = ("val_balanced_accuracy", "val_image_accuracy")
    return [
        {"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 2 / epoch} | {name: score(epoch) for name in scores}
        for epoch in range(1, epochs + 1)
    ]


@pytest.mark.parametrize("epochs", [1, 5, 100])
def test_each_curve_is_named_at_its_end(drawn, epochs):
    history = make_history(epochs, lambda epoch: epoch / epochs)
    losses, scores = drawn(draw_curves, history, min(4, epochs)).axes
    named = {axes: [text.get_text() for text in axes.texts] for axes in (losses, scores)}
    assert named == {losses: ["training", "validation"], scores: ["balanced accuracy", "image accuracy"]}
    for axes, keys in ((losses, ["train_loss", "val_loss"]), (scores, ["val_balanced_accuracy", "val_image_accuracy"])):
        assert axes.get_legend() is None
        *curves, best = axes.lines
        for curve, key, text in zip(curves, keys, axes.texts, strict=True):
            np.testing.assert_array_equal(curve.get_data(), [range(1, epochs + 1), [row[key] for row in history]])
            assert text.get_color() == curve.get_color()
            assert text.xy[1] == history[-1][key]
        assert set(best.get_xdata()) == {min(4, epochs)}


def test_equal_curves_are_both_seen(drawn):
    _, scores = drawn(draw_curves, make_history(3), 3).axes
    first, second, _ = scores.lines
    assert first.get_marker() != second.get_marker()
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_fillstyle() == "none"
    assert first.get_markersize() > 1.5 * second.get_markersize()
    boxes = [text.get_window_extent() for text in scores.texts]
    assert not boxes[0].overlaps(boxes[1])


@pytest.mark.parametrize(
    ("score", "limits"),
    [
        (lambda epoch: 0.5, (0.33, 0.67)),  # noise is not stretched
        (lambda epoch: 0, (-0.02, 0.32)),
        (lambda epoch: 1, (0.68, 1.02)),
        (lambda epoch: 0.2 * epoch, (0.14, 1.02)),
    ],
)
def test_scores_have_an_axis_that_fits(drawn, score, limits):
    _, scores = drawn(draw_curves, make_history(5, score), 5).axes
    assert scores.get_ylim() == pytest.approx(limits, abs=0.01)


def test_without_validation_there_is_no_panel_of_scores(drawn):
    history = [{"epoch": epoch, "train_loss": 1 / epoch} for epoch in (1, 2)]
    (losses,) = drawn(draw_curves, history, 2).axes
    assert [text.get_text() for text in losses.texts] == ["training"]


def test_roc_of_two_classes_is_one_curve(drawn):
    targets, probabilities = random_predictions(60, 2)
    figure = drawn(draw_roc, targets, probabilities, BINARY)
    expected, count = area(targets == 1, probabilities[:, 1]), (targets == 1).sum()
    assert handles(figure.legends[0]) == [f"malignant (n = {count}): AUC {expected:.2f}", "chance: AUC 0.50"]


def test_roc_of_many_classes_has_their_mean(drawn):
    targets, probabilities = random_predictions(300, 8)
    figure = drawn(draw_roc, targets, probabilities, SUBTYPES)
    (axes,) = figure.axes
    areas = [area(targets == index, probabilities[:, index]) for index in range(8)]
    *labels, mean, chance = handles(figure.legends[0])
    assert labels == [
        f"{name} (n = {(targets == index).sum()}): AUC {areas[index]:.2f}"
        for index, name in enumerate(full_names(SUBTYPES))
    ]
    assert mean == f"mean of these 8: AUC {np.mean(areas):.2f}"
    assert chance == "chance: AUC 0.50"
    x, y = next(line for line in axes.lines if line.get_label() == mean).get_data()
    assert np.trapezoid(y, x) == pytest.approx(np.mean(areas), abs=0.02)


def test_classes_of_a_roc_differ_from_each_other_and_from_chance(drawn):
    figure = drawn(draw_roc, *random_predictions(300, 8), SUBTYPES)
    *curves, mean, chance = figure.axes[0].lines
    colours = [to_rgb(line.get_color()) for line in (*curves, mean, chance)]
    assert len(set(colours)) == 10
    saturated = [max(colour) - min(colour) > 0.15 for colour in colours]
    assert saturated == [True] * 8 + [False] * 2  # black and grey are the mean and chance alone
    assert chance.get_linestyle() == ":"
    assert len({line.get_linestyle() for line in curves[:4]}) == len({line.get_linestyle() for line in curves[4:]}) == 1
    assert curves[0].get_linestyle() != curves[4].get_linestyle()
    figure = drawn(draw_roc, *random_predictions(60, 2), BINARY)
    assert figure.axes[0].lines[0].get_linestyle() == "-"


@pytest.mark.parametrize("classes", [BINARY, SUBTYPES])
def test_the_legend_of_a_roc_leaves_most_of_the_figure_to_the_curves(drawn, classes):
    figure = drawn(draw_roc, *random_predictions(400, len(classes)), classes)
    assert figure.legends[0].get_window_extent().height < 0.2 * figure.bbox.height
    assert figure.axes[0].get_window_extent().width > 0.6 * figure.bbox.width


def test_a_roc_of_few_images_is_not_drawn(drawn):
    targets = np.repeat([0, 1, 4, 5], [20, 5, 4, 1])
    _, probabilities = random_predictions(30, 8)
    figure = drawn(draw_roc, targets.tolist(), probabilities.tolist(), SUBTYPES)
    assert [text.split(" (")[0] for text in handles(figure.legends[0])] == [
        *("A adenosis", "F fibroadenoma", "mean of these 2: AUC " + handles(figure.legends[0])[2][-4:]),
        "chance: AUC 0.50",
    ]
    expected = (
        "; no curve with fewer than 5 images of the class or the rest: "
        "PT (n = 0), TA (n = 0), DC (n = 4), LC (n = 1), MC (n = 0), PC (n = 0)"
    )
    assert texts_above(figure)[1].endswith(expected)


@pytest.mark.parametrize("targets", [[0] * 9, [1] * 9, [0] * 9 + [1] * 4, [1] * 9 + [0] * 4])
def test_roc_of_nearly_one_class_has_no_curve(drawn, targets):
    figure = drawn(draw_roc, targets, [[0.3, 0.7]] * len(targets), BINARY)
    assert handles(figure.legends[0]) == ["chance: AUC 0.50"]
    assert texts_above(figure)[1].endswith(f"of the class or the rest: malignant (n = {sum(targets)})")


def dots_of(axes):
    """Return places and areas of the dots."""
    (dots,) = axes.collections
    return np.array(dots.get_offsets()).T, dots.get_sizes()


@pytest.mark.parametrize("classes", [2, 8])
def test_calibration_counts_every_image_once(drawn, classes):
    targets, probabilities = random_predictions(400, classes)
    figure = drawn(draw_calibration, targets, probabilities)
    dots, counts = figure.axes
    heights = np.array([patch.get_height() for patch in counts.patches])
    assert heights.sum() == 400
    (confidences, shares), sizes = dots_of(dots)
    weights = heights[heights > 0]
    np.testing.assert_allclose(sizes / sizes.max(), weights / weights.max())  # a bin of two images is a small dot
    hits = probabilities.argmax(1) == targets
    assert np.average(shares, weights=weights) == pytest.approx(hits.mean())
    assert np.average(confidences, weights=weights) == pytest.approx(probabilities.max(1).mean())
    error = np.average(np.abs(shares - confidences), weights=weights)
    assert texts_above(figure)[0].endswith(f", expected calibration error {error:.3f}")


@pytest.mark.parametrize("classes", [2, 8])
def test_calibration_shows_what_can_occur_without_joining_bins(drawn, classes):
    dots, counts = drawn(draw_calibration, *random_predictions(400, classes)).axes
    (perfect,) = dots.lines  # the bins are not joined
    np.testing.assert_allclose(perfect.get_xdata(), [1 / classes, 1])
    low, high = dots.get_xlim()
    assert 1 / classes - 0.1 < low < 1 / classes
    assert 1 < high < 1.1
    assert counts.get_xlim() == (low, high)
    assert [handles(axes.get_legend()) if axes.get_legend() else None for axes in (dots, counts)] == [
        ["perfectly calibrated", "images of one bin, area by number"],
        None,
    ]


@pytest.mark.parametrize(("target", "share"), [(0, 1), (1, 0)])
def test_calibration_of_a_model_that_is_always_or_never_right(drawn, target, share):
    dots, _ = drawn(draw_calibration, [target] * 3, [[0.9, 0.1], [0.8, 0.2], [1.0, 0.0]]).axes
    (_, shares), _ = dots_of(dots)
    assert set(shares) == {share}
