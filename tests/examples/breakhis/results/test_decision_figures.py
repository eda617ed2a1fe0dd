"""Figures of gates and branch weights, by the objects that are drawn."""

import numpy as np
import pytest
from breakhis.results.decision_figures import BranchWeights, draw_branch_weights, draw_gates

from tests.support.figures import handles, texts_above
from tests.support.runs import BINARY, SUBTYPES


@pytest.mark.parametrize("labels", [["a", "b", "c"], SUBTYPES])
def test_every_class_has_its_channels_in_the_same_order(drawn, labels):
    shares = np.random.default_rng(0).uniform(size=(len(labels), 320))
    shares[0] = np.nan
    top, differences, bar = drawn(draw_gates, shares, labels).axes
    mean = shares[1:].mean(axis=0)
    order = sorted(range(320), key=lambda channel: -mean[channel])
    line, reference = top.lines
    np.testing.assert_allclose(line.get_ydata(), mean[order])
    assert set(reference.get_ydata()) == {0.5}
    (image,) = differences.images
    np.testing.assert_allclose(image.get_array()[1:], (shares - mean)[1:, order])
    assert image.get_interpolation() == "nearest"
    low, high = image.get_clim()
    assert low == -high == -np.abs((shares - mean)[1:]).max()
    assert bar.get_ylim() == (low, high)
    assert [label.get_text() for label in differences.get_yticklabels()] == labels
    (hatched,) = [patch for patch in differences.patches if patch.get_hatch()]
    assert hatched.get_bbox().bounds == (-0.5, -0.5, 320, 1)  # the row of the absent class
    assert top.get_xlim() == differences.get_xlim() == (-0.5, 319.5)


def test_the_unit_of_gates_is_explained(drawn):
    figure = drawn(draw_gates, np.full((2, 16), 0.5), BINARY)
    note = "share of a map's positions with an open gate, mean over images, dotted: an untrained CFE on symmetric maps"
    assert texts_above(figure)[1].endswith(f"; {note}")


def make_weights(classes: int, seed: int = 0) -> BranchWeights:
    rng = np.random.default_rng(seed)
    means = rng.dirichlet([20] * 4, size=classes)
    return BranchWeights(means, means - rng.uniform(0, 0.02, means.shape), means + 0.03, "case")


@pytest.mark.parametrize("labels", [BINARY, SUBTYPES])
def test_branch_weights_are_differences_with_intervals(drawn, labels):
    weights, branches = make_weights(len(labels)), [f"{size} x {size} px" for size in (1, 3, 5, 7)]
    figure = drawn(draw_branch_weights, weights, branches, labels)
    (axes,) = figure.axes
    assert handles(figure.legends[0]) == labels
    assert [label.get_text() for label in axes.get_xticklabels()] == branches
    assert axes.get_ylabel() == "weight less 1/4"
    drawn_bars = [container for container in axes.containers if container.has_yerr]
    for container, mean, low, high in zip(drawn_bars, weights.means, weights.low, weights.high, strict=True):
        points, _, (bars,) = container
        np.testing.assert_allclose(points.get_ydata(), mean - 0.25)
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, np.stack([low, high], axis=1) - 0.25)
        assert points.get_fillstyle() == "full"
    assert not axes.patches  # no bars from 0


def test_classes_without_images_leave_no_gap(drawn):
    weights = make_weights(8)
    for index in (0, 3, 4):
        weights.means[index] = weights.low[index] = weights.high[index] = np.nan
    figure = drawn(draw_branch_weights, weights, ["a", "b", "c", "d"], SUBTYPES)
    (axes,) = figure.axes
    assert handles(figure.legends[0]) == SUBTYPES  # also those without images
    places = np.array([container[0].get_xdata() for container in axes.containers])
    assert places.shape == (5, 4)
    np.testing.assert_allclose(np.diff(places, axis=0), 0.7 / 5)  # evenly spaced
    np.testing.assert_allclose(places.mean(axis=0), [0, 1, 2, 3])


def test_a_class_of_one_case_has_no_interval(drawn):
    weights = make_weights(2)
    weights.low[1] = weights.high[1] = np.nan
    figure = drawn(draw_branch_weights, weights, ["a", "b", "c", "d"], BINARY)
    first, second = figure.axes[0].containers
    assert (first.has_yerr, second.has_yerr) == (True, False)
    assert (first[0].get_fillstyle(), second[0].get_fillstyle()) == ("full", "none")
    note = "; bar: 95 % interval over resampled cases, hollow: one case only, no interval"
    assert texts_above(figure)[1].endswith(note)
