import logging
from pathlib import Path

from breakhis.data.naming import BREAKHIS, parse_name
from breakhis.data.splits import fold_split
from breakhis.results.report import log_split


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
