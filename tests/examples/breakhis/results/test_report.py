import logging
from pathlib import Path

import pytest
from breakhis.data.naming import parse_name
from breakhis.data.sources import BREAKHIS
from breakhis.data.splits import fold_split
from breakhis.results.report import count_images, describe_images, log_crop, log_split
from PIL import Image


def test_absent_classes_are_named_in_the_log(caplog):
    names = [f"SOB_{kind}-100-00{i}.png" for kind in ("B_A-14-1", "M_DC-14-2") for i in (1, 2)]
    records = [parse_name(Path(name)) for name in names]
    with caplog.at_level(logging.INFO, logger="breakhis"):
        split = fold_split(records, "binary", "patient", num_folds=2, fold=0, seed=0)
        log_split(split, "binary", BREAKHIS.classes["binary"])
    assert split.val == []
    text = "\n".join(caplog.messages)
    for sentence in (
        "train: 2 images of 1 patients",
        "WARNING: train has no image of",
        "WARNING: train has one class only: no model can learn to tell classes apart",
        "WARNING: test has one class only: balanced accuracy is its recall",
        "too few patients or images for a validation set, so best = last epoch",
    ):
        assert sentence in text


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ((77, 4, 3), "77 test images of 4 patients (3 cases)"),
        ((77, 4, 1), "77 test images of 4 patients (1 case)"),
        ((77, 4, 4), "77 test images of 4 patients"),
        ((77, 4, None), "77 test images of 4 patients"),
        ((1, 1, 1), "1 test image of 1 patient"),
    ],
)
def test_images_are_counted_with_their_patients_and_cases(counts, text):
    assert count_images(*counts, "test") == text


def test_each_part_of_a_run_has_its_own_counts():
    metrics = {"n_images": {"val": 5, "test": 9}, "n_patients": {"val": 2, "test": 3}, "n_cases": {"val": 1, "test": 3}}
    assert describe_images(metrics, "val") == "5 validation images of 2 patients (1 case)"
    assert describe_images(metrics, "test") == "9 test images of 3 patients"


@pytest.mark.parametrize(
    ("mode", "size", "share"), [("center", (700, 460), 66), ("center", (50, 50), 100), ("squash", (700, 460), 100)]
)
def test_the_log_says_how_much_of_a_field_is_seen(mode, size, share, tmp_path, caplog):
    Image.new("RGB", size).save(tmp_path / "field.png")
    with caplog.at_level(logging.INFO):
        log_crop(mode, tmp_path / "field.png")
    assert caplog.messages == [f"evaluation sees {share} % of a field of {size[0]} x {size[1]} px: crop mode {mode}"]
