import json
from pathlib import Path

import pytest
from breakhis.results.explained_runs import read_run, study_variants

METRICS = {
    "dataset": "breakhis",
    "protocol_in_words": "patient protocol",
    "fold_in_words": "fold 0 of 3",
    "task": "binary",
}
METRICS |= {"scored_on": "test", "variant": "KFDE", "magnification": "40X", "fold": 0, "seed": 0, "synthetic": False}
METRICS |= {"classes": ["a", "b"], "flags": {"data_dir": "data"}, "best_sha256": {}, "further": None}
TABLE = "file,patient,case,target,prediction,prob_a,prob_b\n1.png,p,p,a,a,0.75,0.25\n"


def write_run(folder: Path, table: str = TABLE, **changes: object) -> None:
    (folder / "metrics.json").write_text(json.dumps(METRICS | changes))
    (folder / "predictions.csv").write_text(table)


def test_a_run_is_read_with_its_predictions(tmp_path):
    write_run(tmp_path)
    run = read_run(tmp_path)
    assert {key: run[key] for key in METRICS} == METRICS
    assert run["folder"] == tmp_path
    assert [row["file"] for row in run["predictions"]] == ["1.png"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("variant", 3), ("magnification", None), ("fold", "0"), ("seed", 1.5), ("classes", "ab"), ("flags", [])),
        *(("synthetic", "no"), ("dataset", {}), ("task", ["binary"])),
        *(("best_sha256", None), ("best_sha256", [])),
    ],
)
def test_entries_of_a_wrong_type_are_named(tmp_path, key, value):
    write_run(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=rf"{tmp_path}/metrics.json must have {key} of type \w+, got "):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        (TABLE, {"scored_on": "train"}, "metrics.json must have scored_on test or val, got 'train'"),
        (TABLE.replace("p,a", "p,c"), {}, r"predictions.csv must have a target of \['a', 'b'\], got 'c' in line 2"),
        (TABLE.replace("0.75", "many"), {}, "predictions.csv must have numbers, got in line 2: .*'many'"),
        (TABLE, {"classes": [1, 2]}, "predictions.csv must have a value for prob_1"),
    ],
)
def test_wrong_entries_are_named(tmp_path, table, changes, message):
    write_run(tmp_path, table, **changes)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{message}"):
        read_run(tmp_path)


def test_the_order_of_a_study(tmp_path):
    path = tmp_path / "results.json"
    assert study_variants(path) == []
    path.write_text(json.dumps({"cells": [{"variant": "b"}, {"variant": "a"}]}))
    assert study_variants(path) == ["b", "a"]


@pytest.mark.parametrize("content", ["{}", '{"cells": 3}', '{"cells": [1]}', '{"cells": [{}]}', "[]", "{", "\xff"])
def test_a_broken_study_is_named(tmp_path, content):
    (tmp_path / "results.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{tmp_path}/results.json must"):
        study_variants(tmp_path / "results.json")
