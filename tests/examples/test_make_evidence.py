"""The script that makes the evidence, and what it has kept."""

import csv
import json
from pathlib import Path

import make_evidence
import numpy as np
import pytest
import yaml
from breakhis.metrics import balanced_accuracy, image_accuracy
from breakhis.study import markdown

from tests.helpers import needs_local_dir

KEPT = sorted(path.parent for path in make_evidence.STUDIES.glob("*/results.json"))


def columns(folder: Path, variant: str, seed: int) -> tuple[list[int], np.ndarray]:
    """Targets and probabilities of one variant and seed, over all folds, from what is kept."""
    classes = json.loads((folder / "results.json").read_text())["classes"]
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (name,) = {key.split(" prob_")[0] for key in rows[0] if key.startswith(f"{variant}-") and f"-seed{seed} " in key}
    probabilities = np.array([[float(row[f"{name} prob_{kind}"]) for kind in classes] for row in rows])
    return [classes.index(row["target"]) for row in rows], probabilities


def assert_kept(folder: Path) -> None:
    """Scores of single runs, computed again from the predictions, are those of the results."""
    with (folder / "results.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert runs
    for variant, seed in {(run["variant"], int(run["seed"])) for run in runs}:
        folds = [run for run in runs if (run["variant"], int(run["seed"])) == (variant, seed)]
        targets, probabilities = columns(folder, variant, seed)
        sizes = [int(run["n_images"]) for run in folds]
        wanted = np.average([float(run["image_accuracy"]) for run in folds], weights=sizes)
        # Four digits may turn a tie, and no more than that.
        assert image_accuracy(targets, probabilities) == pytest.approx(wanted, abs=2 / sum(sizes))
        if len(folds) == 1:
            wanted = float(folds[0]["balanced_accuracy"])
            assert balanced_accuracy(targets, probabilities) == pytest.approx(wanted, abs=0.01)


@needs_local_dir
def test_a_study_is_run_and_kept(synthetic_tree, tmp_path, monkeypatch):
    flags = {"img_size": 32, "epochs": 1, "num_folds": 3, "folds": [0, 1], "seeds": [0, 1], "num_workers": 0}
    flags |= {"variants": {"plain": {"csfe": False}, "whole": {}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(flags))
    monkeypatch.setattr(make_evidence, "STUDIES", tmp_path)
    make_evidence.main(["small", "--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path / "runs")])
    kept = tmp_path / "small"
    assert sorted(path.name for path in kept.iterdir()) == [
        "predictions.csv",
        "results.csv",
        "results.json",
        "results.md",
    ]
    assert_kept(kept)


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_what_is_kept_agrees_with_itself_and_with_its_flags(folder):
    assert_kept(folder)
    assert (folder / "results.md").read_text() == markdown(json.loads((folder / "results.json").read_text())) + "\n"
    flags = yaml.safe_load(folder.with_suffix(".yaml").read_text())
    with (folder / "results.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert {run["variant"] for run in runs} == set(flags["variants"])
    assert {int(run["seed"]) for run in runs} == set(flags.get("seeds", [0]))
