"""A study can tell a block that helps from one that does not."""

import json

import pytest
from breakhis.results.intervals import Interval, verdict
from train_breakhis import main

from kfde_layers.insertion import making
from tests.support.planted import Reader, Scale, draw_watermarked_tree

ARMS = "{plain: {}, useful: {insert: {stem: [reader]}}, useless: {insert: {centre: [scale]}}}"


@pytest.mark.slow
def test_a_block_that_sees_the_class_is_better_and_one_that_sees_nothing_is_equal(tmp_path, monkeypatch):
    monkeypatch.setitem(making._LAYERS, "reader", Reader)
    monkeypatch.setitem(making._LAYERS, "scale", Scale)
    draw_watermarked_tree(tmp_path / "data", cases_per_class=24, images_per_case=3)
    flags = ["--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path / "runs"), "--model", "blind"]
    flags += ["--img-size", "32", "--variants", ARMS, "--no-identity-start", "--folds", "all", "--num-folds", "2"]
    flags += ["--epochs", "4", "--lr", "0.003", "--color-jitter", "0", "--num-workers", "0"]
    main([*flags, "--question", "Which block helps?", "--primary-score", "auc", "--margin", "0.01"])
    rows = json.loads((tmp_path / "runs/results.json").read_text())["intervals"]
    found = {row["variant"]: row for row in rows if row["score"] == "auc"}
    assert 0.2 < found["plain"]["value"] < 0.8  # it cannot see the watermark
    verdicts = {
        name: verdict(Interval(row["difference"], row["low"], row["high"]), 0.01)
        for name, row in found.items()
        if "difference" in row
    }
    assert verdicts == {"useful": "better", "useless": "equal within 0.01"}
    tables = (tmp_path / "runs/results.md").read_text()
    assert ": better" in tables
    assert ": equal within 0.01" in tables
