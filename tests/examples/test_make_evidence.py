"""The script that makes the evidence, and the results that it has kept."""

import json
import re
import shutil
from pathlib import Path

import make_evidence
import numpy as np
import pytest
import yaml
from breakhis.files import read_csv
from breakhis.results import paper
from breakhis.results.metrics import auc, balanced_accuracy, image_accuracy
from breakhis.results.study import markdown
from breakhis.training.options import expand, parse_args

from tests.support.runs import ROOT, launch

STUDY_FOLDERS = sorted(path.parent for path in make_evidence.STUDIES.glob("*/results.json"))


def assert_predictions_match_scores(folder: Path) -> None:
    """Compute the scores of single runs from the predictions, and compare them with the results."""
    classes = json.loads((folder / "results.json").read_text())["classes"]
    predictions, runs = read_csv(folder / "predictions.csv"), read_csv(folder / "results.csv")
    assert runs
    for run in runs:
        rows = [row for row in predictions if row["fold"] == run["fold"]]
        assert len(rows) == int(run["n_images"])
        assert len({row["patient"] for row in rows}) == int(run["n_patients"])
        targets = [classes.index(row["target"]) for row in rows]
        column = f"{run['variant']} seed {run['seed']}"
        probabilities = np.array([[float(row[f"{column} prob_{name}"]) for name in classes] for row in rows])
        # Rounding to few digits, as in the older studies, may change the result of one or two ties, but not more.
        smallest = min(targets.count(target) for target in set(targets))
        assert image_accuracy(targets, probabilities) == pytest.approx(float(run["image_accuracy"]), abs=2 / len(rows))
        expected = pytest.approx(float(run["balanced_accuracy"]), abs=2 / smallest / len(set(targets)))
        assert balanced_accuracy(targets, probabilities) == expected
        if run["auc"]:
            assert auc(targets, probabilities) == pytest.approx(float(run["auc"]), abs=0.01)


@pytest.mark.slow
def test_a_study_is_run_and_kept(synthetic_tree, tmp_path, monkeypatch):
    flags = {"img_size": 32, "epochs": 1, "num_folds": 3, "folds": [0, 1], "seeds": [0, 1], "num_workers": 0}
    flags |= {"model_kwargs": {"depths": [1, 1, 1, 1], "dims": [16, 32, 48, 64]}}
    flags |= {"variants": {"plain": {"csfe": False}, "kfde": {}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(flags))
    monkeypatch.setattr(make_evidence, "STUDIES", tmp_path)
    make_evidence.main(["small", "--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path / "runs")])
    folder = tmp_path / "small"
    assert sorted(path.name for path in folder.iterdir()) == [
        "predictions.csv",
        "results.csv",
        "results.json",
        "results.md",
    ]
    assert_predictions_match_scores(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonesuch", "--data-dir", ".", "--output-dir", "out"], "argument study: invalid choice: 'nonesuch'"),
        (["idc", "--data-dir", "none", "--output-dir", "out"], "argument --data-dir: must be a directory, got 'none'"),
        (["paper-binary", "--data-dir", ".", "--output-dir", "out"], "study: invalid choice: 'paper-binary'"),
        (["idc", "--data-dir", ".", "--output-dir", "out", "--epochs", "1"], "unrecognized arguments: --epochs 1"),
        (
            ["idc", "--data-dir", ".", "--output-dir", "out", "--shard", "3/2"],
            "--shard: must be I/N with I from",
        ),
        (["idc", "--data-dir", ".", "--output-dir", "a\0b"], "argument --output-dir: must be a path, which has no NUL"),
    ],
)
def test_wrong_arguments_are_named_with_their_values(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        make_evidence.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_predictions_that_are_broken_are_not_kept(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"variant": "a", "seed": 0, "fold": 0, "classes": ["x"]}))
    (tmp_path / "predictions.csv").write_text("file,patient,case,target,prob_x\n1.png,p,p,x,\n")
    with pytest.raises(
        ValueError, match=r"predictions.csv must have a value for prob_x in each line, got none in line 2"
    ):
        make_evidence.keep_predictions([tmp_path], tmp_path / "kept.csv")
    assert not (tmp_path / "kept.csv").exists()


@pytest.mark.parametrize("folder", STUDY_FOLDERS, ids=lambda folder: folder.name)
def test_the_kept_results_agree_with_each_other_and_with_the_flags(folder):
    assert_predictions_match_scores(folder)
    assert (folder / "results.md").read_text() == markdown(json.loads((folder / "results.json").read_text())) + "\n"
    study = "paper" if folder.name.startswith("paper-") else folder.name
    _, config, *_ = make_evidence.list_studies(study)[folder.name]
    flags = yaml.safe_load(Path(config).read_text())
    runs = read_csv(folder / "results.csv")
    assert {run["variant"] for run in runs} == set(flags["variants"])
    assert {int(run["seed"]) for run in runs} == set(flags.get("seeds", [0]))


@pytest.mark.parametrize("table", make_evidence.TABLES)
def test_each_row_of_a_table_of_the_paper_is_a_method(table, tmp_path):
    """The paper writes BHCNET for both sizes, and "Hybrid" before CNN-LSTM."""
    (tmp_path / "data").mkdir()
    arguments = ["--config", str(make_evidence.STUDIES / f"{table}.yaml"), "--data-dir", str(tmp_path / "data")]
    args = parse_args([*arguments, "--output-dir", str(tmp_path / "runs")])
    names = {name.upper() for name in args.variants} - {"KFDE-NO-IDENTITY", "KFDE-DENSE"}  # not in the paper's tables
    rows = paper.ABLATION if table == "paper-ablation" else paper.TABLES[args.task]
    assert {re.sub(r"-[36]$", "", name) for name in names} == {row.upper().removeprefix("HYBRID ") for row in rows}
    assert args.magnification == list(paper.MAGNIFICATIONS)
    assert len(expand(args)) == len(args.variants) * 4 * 5


def test_the_papers_tables_are_as_many_runs_as_the_readme_says(tmp_path):
    (tmp_path / "data").mkdir()
    common = ["--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path / "runs")]
    studies = [parse_args([*flags, *common]) for flags in make_evidence.list_studies("paper").values()]
    epochs = {run.epochs for args in studies for run in expand(args)}
    said = f"{sum(len(expand(args)) for args in studies)} runs of {epochs.pop()} epochs"
    assert not epochs
    assert said in (ROOT / "examples/README.md").read_text()


@pytest.fixture
def small_tables(tmp_path):
    """Copy the script, with tables of two small methods and one fold."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", "*.csv"))
    for table in make_evidence.TABLES:
        path = tmp_path / "examples/evidence" / f"{table}.yaml"
        flags = yaml.safe_load(path.read_text()) | {"folds": [0], "magnification": ["100X"]}
        flags |= {"model": "bhcnet_3", "variants": {"KFDE": {}, "sgd": {"opt": "sgd"}}, "pretrained": False}
        flags |= {"img_size": 32, "epochs": 1, "batch_size": 8, "num_folds": 3}
        path.write_text(yaml.safe_dump(flags))
    return tmp_path / "examples"


@pytest.mark.slow
def test_the_papers_tables_are_divided_among_machines_and_processes(
    small_tables, synthetic_tree, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(make_evidence, "STUDIES", small_tables / "evidence")
    flags = ["paper", "--data-dir", str(synthetic_tree), "--num-workers", "0"]
    make_evidence.main([*flags, "--output-dir", str(tmp_path / "runs"), "--shard", "1/2"])
    printed = capsys.readouterr().out
    assert printed.startswith(
        "paper-binary-image: 2 methods, 2 runs\npaper-binary-case: 2 methods, 2 runs\npaper-subtype-image: "
    )
    assert "left to this process: 6 runs, 6 epochs; the first epoch will be timed" in printed
    folders = [f"{table}-{protocol}" for table in make_evidence.TABLES for protocol in ("image", "case")]
    assert not any((small_tables / "evidence" / folder).exists() for folder in folders)
    process = launch(tmp_path / "runs", 2, *flags, "--shard", "2/2", script=small_tables / "make_evidence.py")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("left to this process") == 1
    for folder in folders:
        assert_predictions_match_scores(small_tables / "evidence" / folder)
        results = json.loads((small_tables / "evidence" / folder / "results.json").read_text())
        assert {row["variant"] for row in results["intervals"]} == {"KFDE", "sgd"}
        assert results["cells"][0]["protocol"].startswith(
            "image protocol" if folder.endswith("image") else "case protocol"
        )
