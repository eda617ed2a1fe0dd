import numpy as np
import pytest
from breakhis.results.metrics import (
    auc,
    balanced_accuracy,
    expected_calibration_error,
    image_accuracy,
    patient_recognition_rate,
    score,
)
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score

# Six images of three patients; class 2 of 3 is never a target, and predicted once.
TARGETS = [0, 0, 0, 0, 1, 1]
PREDICTIONS = [0, 0, 1, 2, 1, 0]
PATIENTS = ["a", "a", "a", "b", "c", "c"]


def certain(predictions: list[int], num_classes: int) -> np.ndarray:
    """Make probabilities of 1 for the predictions."""
    return np.eye(num_classes)[predictions]


def test_scores_worked_by_hand():
    scores = score(TARGETS, certain(PREDICTIONS, 3), PATIENTS)
    assert scores["image_accuracy"] == pytest.approx(3 / 6)
    assert scores["patient_recognition_rate"] == pytest.approx((2 / 3 + 0 + 1 / 2) / 3)
    assert scores["balanced_accuracy"] == pytest.approx((2 / 4 + 1 / 2) / 2)
    # F1: class 0: precision 2/3, recall 1/2 -> 4/7; class 1: 1/2, 1/2 -> 1/2; class 2, predicted only: 0.
    assert scores["macro_f1"] == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    # The two classes have 4 x 2 pairs. By the probability of class 0, 2 pairs are in order, 4 tied, 2 out of order.
    assert scores["auc"] == pytest.approx(((2 + 4 / 2) / 8 + (3 + 4 / 2) / 8) / 2)
    assert scores["ece"] == pytest.approx(1 - 3 / 6)  # always certain, and right half of the time
    assert scores["confusion_matrix"] == [[2, 1, 1], [1, 1, 0], [0, 0, 0]]


def test_a_patient_counts_once_with_any_number_of_images():
    assert patient_recognition_rate([0] * 10, [0] * 9 + [1], ["a"] * 9 + ["b"]) == pytest.approx(0.5)


def test_one_class_only():
    assert balanced_accuracy([1, 1, 1, 1], certain([1, 1, 1, 0], 2)) == pytest.approx(0.75)
    scores = score([1, 1], certain([1, 1], 2), ["a", "b"])
    assert scores["balanced_accuracy"] == scores["macro_f1"] == 1
    assert scores["auc"] is None
    assert scores["confusion_matrix"] == [[0, 0], [0, 2]]


def test_calibration_worked_by_hand():
    # Confidence 0.9, and right nine times in ten; confidence 0.6, and never right.
    rows = np.array([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10)
    targets = [0] * 9 + [1] * 11
    assert expected_calibration_error(targets, rows) == pytest.approx((0.0 + 0.6) / 2, abs=1e-6)


def test_an_area_worked_by_hand():
    assert auc([0, 0, 1, 1], [[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]]) == pytest.approx(3 / 4)


images = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=20)


@given(images)
def test_a_weight_equals_repeated_images(rows):
    targets, predictions, weight = map(list, zip(*rows, strict=True))
    rng = np.random.default_rng(0)
    probabilities = 0.3 * rng.dirichlet(np.ones(3), len(rows)) + 0.7 * certain(predictions, 3)
    repeated = np.repeat(np.arange(len(rows)), weight)
    for function in (image_accuracy, balanced_accuracy, auc):
        weighted = function(targets, probabilities, weight)
        assert weighted == pytest.approx(function(np.array(targets)[repeated], probabilities[repeated])), function


@given(images)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_accuracies_are_scikit_learns(rows):
    targets, predictions, weight = map(list, zip(*rows, strict=True))
    expected = accuracy_score(targets, predictions, sample_weight=weight)
    assert image_accuracy(targets, certain(predictions, 3), weight) == pytest.approx(expected)
    expected = balanced_accuracy_score(targets, predictions, sample_weight=weight)
    assert balanced_accuracy(targets, certain(predictions, 3), weight) == pytest.approx(expected)
