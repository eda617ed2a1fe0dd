import pytest
from breakhis.metrics import balanced_accuracy, patient_recognition_rate, score

# Six images of three patients; class 2 of 3 is never a target, and predicted once.
TARGETS = [0, 0, 0, 0, 1, 1]
PREDICTIONS = [0, 0, 1, 2, 1, 0]
PATIENTS = ["a", "a", "a", "b", "c", "c"]


def test_scores_worked_by_hand():
    scores = score(TARGETS, PREDICTIONS, PATIENTS, num_classes=3)
    assert scores["image_accuracy"] == pytest.approx(3 / 6)
    assert scores["patient_recognition_rate"] == pytest.approx((2 / 3 + 0 + 1 / 2) / 3)
    assert scores["balanced_accuracy"] == pytest.approx((2 / 4 + 1 / 2) / 2)
    # F1: class 0: precision 2/3, recall 1/2 -> 4/7; class 1: 1/2, 1/2 -> 1/2; class 2, predicted only: 0.
    assert scores["macro_f1"] == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    assert scores["confusion_matrix"] == [[2, 1, 1], [1, 1, 0], [0, 0, 0]]


def test_a_patient_counts_once_however_many_images_there_are():
    assert patient_recognition_rate([0] * 10, [0] * 9 + [1], ["a"] * 9 + ["b"]) == pytest.approx(0.5)


def test_one_class_only():
    assert balanced_accuracy([1, 1, 1, 1], [1, 1, 1, 0]) == pytest.approx(0.75)
    scores = score([1, 1], [1, 1], ["a", "b"], num_classes=2)
    assert scores["balanced_accuracy"] == scores["macro_f1"] == 1
    assert scores["confusion_matrix"] == [[0, 0], [0, 2]]
