"""What the figures of a run say above them."""

from pathlib import Path

import pytest
from breakhis.results.canvas import Heading
from breakhis.results.run_figures import draw_figures
from PIL import Image

METRICS = {
    **{"classes": ["benign", "malignant"], "task": "binary", "dataset": "breakhis", "synthetic": False},
    **{"magnification": "40X", "protocol_in_words": "patient protocol", "fold_in_words": "fold 0 of 5"},
    **{"scored_on": "test", "best_epoch": 2, "balanced_accuracy": 0.75, "confusion_matrix": [[6, 2], [1, 9]]},
    "n_images": {"train": 40, "val": 10, "test": 18},
    "n_patients": {"train": 8, "val": 2, "test": 3},
    "n_cases": {"train": 7, "val": 2, "test": 2},
    "history": [
        {"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 1 / epoch}
        | {"val_balanced_accuracy": 0.5, "val_image_accuracy": 0.5}
        for epoch in (1, 2, 3)
    ],
}
TARGETS = [0] * 8 + [1] * 10
SCORED = "patient protocol, fold 0 of 5, breakhis 40X, binary, 18 test images of 3 patients (2 cases)"
LEARNT = "40 training images of 8 patients (7 cases)"


def headings(folder: Path, **changes: object) -> dict[str, Heading]:
    """Draw the figures, and read the headings from the files."""
    metrics = METRICS | changes
    count = len(metrics["classes"])
    probabilities = [[0.6 if index == target else 0.4 / (count - 1) for index in range(count)] for target in TARGETS]
    draw_figures(metrics, TARGETS, probabilities, folder)
    read = {}
    for path in folder.iterdir():
        with Image.open(path) as picture:
            read[path.stem] = Heading(picture.info["Title"], picture.info["Description"])
    return read


def test_each_title_says_what_is_shown_and_each_subtitle_by_which_protocol(tmp_path):
    read = headings(tmp_path)
    assert read == {
        "confusion_matrix": Heading("Predictions by true class, balanced accuracy 0.750", SCORED),
        "curves": Heading(
            "Training, epoch 2 of 3 is kept",
            f"patient protocol, fold 0 of 5, breakhis 40X, binary, {LEARNT}, 10 validation images of 2 patients",
        ),
        "roc": Heading("ROC of malignant against benign", SCORED),
        "calibration": Heading("Confidence against accuracy, expected calibration error 0.400", SCORED),
    }


@pytest.mark.parametrize("changes", [{"n_images": {"train": 40, "val": 0, "test": 18}}])
def test_a_run_without_validation_counts_none(tmp_path, changes):
    history = [{"epoch": 1, "train_loss": 1.0}, {"epoch": 2, "train_loss": 0.5}]
    assert headings(tmp_path, history=history, **changes)["curves"].subtitle.endswith(f"binary, {LEARNT}")


def test_more_classes_have_a_curve_each(tmp_path):
    changes = {"classes": ["A", "F", "PT"], "confusion_matrix": [[8, 0, 0], [0, 10, 0], [0, 0, 0]]}
    assert headings(tmp_path, **changes)["roc"].title == "ROC of each class against the rest"
