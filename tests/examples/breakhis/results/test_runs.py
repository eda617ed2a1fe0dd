import json

import pytest
from breakhis.results.runs import read_metrics, read_predictions

ROWS = "file,patient,case,target,prediction,prob_a,prob_b\n1.png,p,k,a,a,0.75,0.25\n"


def test_the_files_of_a_run_are_read(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"seed": 3, "auc": None}))
    assert read_metrics(tmp_path, ("seed", "auc")) == {"seed": 3, "auc": None}
    (tmp_path / "predictions.csv").write_text(ROWS)
    (row,) = read_predictions(tmp_path, ["a", "b"])
    assert (row["file"], row["patient"], row["case"], row["target"], row["prob_b"]) == ("1.png", "p", "k", "a", "0.25")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"seed": 3, "folds": 1}'])
def test_broken_metrics_are_refused_by_name(content, tmp_path):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"metrics.json must be (a mapping in JSON|written by .*, got no (seed|fold)$)"
    ):
        read_metrics(tmp_path, ("seed", "fold"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must have a value for file in each line, got none in line 2"),
        (b"\xff\xfe\x00", "must be a table that train_breakhis.py wrote, got "),
        (ROWS.splitlines(keepends=True)[0].encode(), "for file in each line, got none in line 2"),
        (ROWS.replace("prob_b", "prob_c").encode(), "for prob_b in each line, got none in line 2"),
        (f"{ROWS}2.png,p,k,a,a,0.75\n".encode(), "for prob_b in each line, got none in line 3"),
        (
            f"{ROWS}{'x' * 200_000},p,k,a,a,1,0\n".encode(),
            "must be a table that train_breakhis.py wrote, got field larger",
        ),
    ],
    ids=["empty", "binary", "header alone", "other class", "cut off", "long"],
)
def test_a_broken_table_is_refused_by_name(content, message, tmp_path):
    (tmp_path / "predictions.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"predictions.csv {message}|predictions.csv must have a value {message}"):
        read_predictions(tmp_path, ["a", "b"])
