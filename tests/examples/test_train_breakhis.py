"""Small runs of the script that trains."""

import ast
import functools
import json
import math
import os
import random
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from breakhis.data.naming import find_breakhis
from breakhis.data.splits import LEAK_WARNING
from breakhis.data.synthetic import draw_tree
from PIL import Image
from train_breakhis import main

from tests.support.hub import needs_local_dir
from tests.support.locks import lock_holder
from tests.support.pages import python_blocks, run_block
from tests.support.runs import NARROW, SMALL, SUBTYPES, launch, load_input, load_with_timm, read_rows

pytestmark = [needs_local_dir, pytest.mark.slow]  # nearly every test trains a model
ROOT = Path(__file__).parents[2]
README = ROOT / "examples/README.md"
TWO_EPOCHS = [*SMALL, "--epochs", "2"]


def recompute(rows: list[dict[str, str]], classes: list[str]) -> dict[str, object]:
    """Compute the scores of `metrics.json` from the rows of `predictions.csv`, in plain Python."""
    matrix = [[sum(r["target"] == t and r["prediction"] == p for r in rows) for p in classes] for t in classes]
    diagonal = range(len(classes))
    recalls = [matrix[i][i] / sum(matrix[i]) for i in diagonal if sum(matrix[i])]
    f1 = []
    for i in diagonal:
        count = sum(matrix[i]) + sum(matrix[j][i] for j in diagonal)
        if count:
            f1.append(2 * matrix[i][i] / count)
    patients = defaultdict(list)
    for r in rows:
        patients[r["patient"]].append(r["target"] == r["prediction"])
    areas, bins = [], defaultdict(list)
    for name in classes:
        positive = [float(r[f"prob_{name}"]) for r in rows if r["target"] == name]
        negative = [float(r[f"prob_{name}"]) for r in rows if r["target"] != name]
        if positive and negative:
            pairs = [(a > b) + (a == b) / 2 for a in positive for b in negative]
            areas.append(sum(pairs) / len(pairs))
    for r in rows:
        confidence = max(float(r[f"prob_{name}"]) for name in classes)
        bins[math.ceil(confidence * 15)].append(confidence - (r["target"] == r["prediction"]))
    return {
        "auc": sum(areas) / len(areas) if areas else None,
        "ece": sum(abs(sum(gaps)) for gaps in bins.values()) / len(rows),
        "image_accuracy": sum(matrix[i][i] for i in diagonal) / len(rows),
        "patient_recognition_rate": sum(sum(hits) / len(hits) for hits in patients.values()) / len(patients),
        "balanced_accuracy": sum(recalls) / len(recalls),
        "macro_f1": sum(f1) / len(f1),
        "confusion_matrix": matrix,
    }


def assert_consistent(out: Path, data_dir: Path, leak_checker) -> dict:
    """Check every file of a run against the other files; return `metrics.json`."""
    metrics = json.loads((out / "metrics.json").read_text())
    rows, split = read_rows(out / "predictions.csv"), read_rows(out / "split.csv")
    classes = metrics["classes"]
    for key, value in recompute(rows, classes).items():
        assert metrics[key] == (value if key == "confusion_matrix" else pytest.approx(value, abs=1e-6)), key
    files = [row["file"] for row in split]
    records = [record for record in find_breakhis(data_dir).records if record.magnification == metrics["magnification"]]
    assert len(set(files)) == len(files) == len(records)
    assert all((data_dir / file).is_file() for file in files)
    if metrics["protocol"] == "patient":
        assert leak_checker((row["patient"], row["split"]) for row in split) == set()
    for name in ("train", "val", "test"):
        part = [row for row in split if row["split"] == name]
        assert metrics["n_images"][name] == len(part)
        assert metrics["n_patients"][name] == len({row["patient"] for row in part})
    assert sorted(row["file"] for row in rows) == sorted(row["file"] for row in split if row["split"] == "test")
    for row in rows:
        probabilities = {name: float(row[f"prob_{name}"]) for name in classes}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(probabilities, key=probabilities.__getitem__)
    for name in ("best", "last"):
        assert (out / name / "model.safetensors").is_file()
        config = json.loads((out / name / "config.json").read_text())
        assert config["num_classes"] == len(classes)
        assert config["label_names"] == classes
    return metrics


def assert_figures(out: Path) -> None:
    for name in ("confusion_matrix.png", "curves.png", "roc.png", "calibration.png"):
        with Image.open(out / name) as figure:
            assert min(figure.size) > 300


@pytest.fixture(scope="module")
def run(synthetic_tree, tmp_path_factory, with_figures):
    out = tmp_path_factory.mktemp("run")
    with with_figures():
        main(["--data-dir", str(synthetic_tree), "--output-dir", str(out), "--task", "subtype", *TWO_EPOCHS])
    return out


def test_every_file_of_a_run_agrees_with_the_others(run, synthetic_tree, leak_checker):
    assert_figures(run)
    metrics = assert_consistent(run, synthetic_tree, leak_checker)
    assert metrics["protocol"] == "patient"
    assert metrics["task"] == "subtype"
    assert metrics["magnification"] == "100X"
    assert metrics["classes"] == SUBTYPES
    assert (metrics["protocol_in_words"], metrics["fold_in_words"], metrics["seed"]) == (
        "patient protocol",
        "fold 0 of 3",
        0,
    )
    assert metrics["model"] == metrics["variant"] == "kfde_convnextv2_atto"
    assert metrics["flags"]["img_size"] == 64
    assert sum(metrics["n_images"].values()) == 48
    assert metrics["absent_classes"]["train"] == []
    assert len(metrics["history"]) == 2
    assert {"torch", "timm", "kfde_layers", "python"} <= metrics["versions"].keys()


def test_best_is_the_best_on_validation(run):
    metrics = json.loads((run / "metrics.json").read_text())
    ranks = [(row["val_balanced_accuracy"], -row["val_loss"]) for row in metrics["history"]]
    assert metrics["best_epoch"] == ranks.index(max(ranks)) + 1


def test_timm_alone_reproduces_the_predictions(run, synthetic_tree):
    assert_timm_reproduces_predictions(run, synthetic_tree)


def test_the_readme_shows_how_to_load_a_checkpoint(run, synthetic_tree, tmp_path, monkeypatch, capsys):
    (block,) = python_blocks(README)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/synthetic").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    row = read_rows(run / "predictions.csv")[0]
    run_block(block, README, {"file": synthetic_tree / row["file"]})
    printed = ast.literal_eval(capsys.readouterr().out)
    assert printed == pytest.approx({name: float(row[f"prob_{name}"]) for name in printed}, abs=1e-5)
    assert len(printed) == 8


@pytest.fixture
def another_accelerator():
    """Forget the settings that Accelerate keeps for the whole process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_timm_alone_reproduces_the_predictions_after_training_in_bf16(
    synthetic_tree, tmp_path, another_accelerator, no_figures
):
    arguments = ["--task", "subtype", *TWO_EPOCHS, "--mixed-precision", "bf16"]
    (metrics,) = main(["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *arguments])
    assert metrics["mixed_precision"] == "bf16"
    assert_timm_reproduces_predictions(tmp_path, synthetic_tree)


def assert_timm_reproduces_predictions(run, synthetic_tree):
    """Check the checkpoint's input, its classes and its predictions with timm alone."""
    model, transform = load_with_timm(run / "best")
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, 64, 64)
    assert (config["crop_pct"], config["crop_mode"]) == (1.0, "center")
    assert model.pretrained_cfg["label_names"] == SUBTYPES
    for row in read_rows(run / "predictions.csv"):
        with torch.inference_mode():
            probabilities = model(load_input(transform, synthetic_tree / row["file"])).softmax(1)[0]
        written = torch.tensor([float(row[f"prob_{name}"]) for name in model.pretrained_cfg["label_names"]])
        torch.testing.assert_close(probabilities, written, atol=1e-5, rtol=1e-4)


def test_a_run_repeats_itself(run, synthetic_tree, tmp_path):
    main(["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), "--task", "subtype", *TWO_EPOCHS])
    assert (tmp_path / "split.csv").read_text() == (run / "split.csv").read_text()
    first, second = read_rows(run / "predictions.csv"), read_rows(tmp_path / "predictions.csv")
    for before, after in zip(first, second, strict=True):
        assert before["file"] == after["file"]
        assert float(before["prob_A"]) == pytest.approx(float(after["prob_A"]), abs=1e-4)


def test_the_image_protocol_warns_and_is_named_with_its_scores(
    synthetic_tree, tmp_path, leak_checker, caplog, capsys, with_figures
):
    arguments = ["--protocol", "image", *SMALL, *NARROW]
    with with_figures():
        main(["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *arguments])
    assert_figures(tmp_path)
    assert LEAK_WARNING in caplog.messages
    sentence = "image protocol (patients leak), fold 0 of 3, breakhis 100X, binary: image accuracy"
    assert sentence in capsys.readouterr().out
    assert_consistent(tmp_path, synthetic_tree, leak_checker)


def test_synthetic_draws_its_own_data_and_says_so(tmp_path, leak_checker, capsys, monkeypatch):
    draw_few = functools.partial(draw_tree, patients_per_subtype=2, images_per_patient=1)
    monkeypatch.setattr("train_breakhis.draw_tree", draw_few)
    main(["--synthetic", "--magnification", "400X", "--output-dir", str(tmp_path), *SMALL])
    metrics = assert_consistent(tmp_path, tmp_path / "synthetic", leak_checker)
    assert sum(metrics["n_images"].values()) == 16
    assert "patient protocol, fold 0 of 3, synthetic images 400X, binary: image accuracy" in capsys.readouterr().out


def test_download_comes_before_everything(synthetic_tree, tmp_path, monkeypatch, leak_checker):
    hashes = []

    def download(directory: Path, sha256: str | None) -> None:
        """Put the images into a folder whose name is no UTF-8, and link to it."""
        hashes.append(sha256)
        directory.mkdir()
        shutil.copytree(synthetic_tree, tmp_path / os.fsdecode(b"f\xe4rbung"))
        (directory / os.fsdecode(b"l\xefnk")).symlink_to(tmp_path / os.fsdecode(b"f\xe4rbung"))

    monkeypatch.setattr("train_breakhis.download", download)
    arguments = ["--download", "--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path / "out")]
    main([*arguments, *SMALL, "--archive-sha256", "AB" * 32])
    assert hashes == ["ab" * 32]
    assert_consistent(tmp_path / "out", tmp_path / "data", leak_checker)


def test_without_validation_best_is_the_last_epoch(synthetic_tree, tmp_path, leak_checker, caplog, with_figures):
    tree = tmp_path / "data"
    tree.mkdir()
    for name in ("SOB_B_A-14-1001-100-001.png", "SOB_M_DC-14-5001-100-001.png", "SOB_M_DC-14-5002-100-001.png"):
        (tree / name).write_bytes(next(synthetic_tree.rglob(name)).read_bytes())
    with with_figures():
        main(["--data-dir", str(tree), "--output-dir", str(tmp_path / "out"), *TWO_EPOCHS])
    assert_figures(tmp_path / "out")
    metrics = assert_consistent(tmp_path / "out", tree, leak_checker)
    assert metrics["n_images"]["val"] == 0
    assert metrics["best_epoch"] == 2
    assert any("best = last epoch" in message for message in caplog.messages)


def test_two_processes_do_the_same_as_one_and_both_stop_at_a_folder_in_use(
    synthetic_tree, tmp_path, leak_checker, monkeypatch, capsys, another_accelerator
):
    """Launch them once, since that takes long: for two folds, of which the folder of the second is in use."""
    arguments = ["--data-dir", str(synthetic_tree), *TWO_EPOCHS, *NARROW, "--batch-size", "6", "--class-weights"]
    arguments += ["--ema-decay", "0.9", "--grad-accum-steps", "2"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    main([*arguments, "--output-dir", str(tmp_path / "1")])
    folders = [tmp_path / f"2/runs/kfde_convnextv2_atto-100X-fold{fold}-seed0" for fold in range(2)]
    with lock_holder(folders[1]) as holder:
        process = launch(tmp_path / "2", 2, *arguments, "--folds", "0", "1")
    message = f"train_breakhis.py: error: --output-dir {folders[1]} must not be in use, but process {holder.pid} on "
    assert process.returncode != 0
    assert process.stderr.count(message) == 2
    assert list(folders[1].iterdir()) == []

    for text in (capsys.readouterr().out, process.stdout):
        assert text.count("patient protocol, fold 0 of 3") == 1
    one, two = (assert_consistent(folder, synthetic_tree, leak_checker) for folder in (tmp_path / "1", folders[0]))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert sum(two["n_images"].values()) == 48
    for before, after in zip(one["history"], two["history"], strict=True):
        assert before == pytest.approx(after, rel=1e-3)
    tables = (read_rows(folder / "predictions.csv") for folder in (tmp_path / "1", folders[0]))
    for before, after in zip(*tables, strict=True):
        assert before["file"] == after["file"]
        assert float(before["prob_benign"]) == pytest.approx(float(after["prob_benign"]), abs=1e-3)


def test_accumulated_batches_equal_one_batch(synthetic_tree, tmp_path, another_accelerator):
    arguments = ["--data-dir", str(synthetic_tree), *TWO_EPOCHS, *NARROW, "--output-dir"]
    (one_batch,) = main([*arguments, str(tmp_path / "whole"), "--batch-size", "8"])
    AcceleratorState._reset_state()
    (two_batches,) = main([*arguments, str(tmp_path / "parts"), "--batch-size", "4", "--grad-accum-steps", "2"])
    for before, after in zip(one_batch["history"], two_batches["history"], strict=True):
        assert before == pytest.approx(after, rel=1e-3)


@pytest.mark.parametrize("model", ["resnet18", "densenet121", "vit_tiny_patch16_224"])
def test_any_timm_model_trains_and_loads_again(model, synthetic_tree, tmp_path, leak_checker):
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *SMALL]
    main([*arguments, "--model", model])
    assert_consistent(tmp_path, synthetic_tree, leak_checker)


def test_settings_are_chosen_without_the_test_images(synthetic_tree, tmp_path, capsys):
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *TWO_EPOCHS, "--score-on", "val"]
    (metrics,) = main(arguments)
    assert "patient protocol, validation, fold 0 of 3, breakhis 100X, binary" in capsys.readouterr().out
    split = {row["file"]: row["split"] for row in read_rows(tmp_path / "split.csv")}
    assert {split[row["file"]] for row in read_rows(tmp_path / "predictions.csv")} == {"val"}
    best = metrics["history"][metrics["best_epoch"] - 1]
    assert metrics["balanced_accuracy"] == pytest.approx(best["val_balanced_accuracy"])


def test_a_batch_that_processes_cannot_share_is_refused(synthetic_tree, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(SystemExit, match="--batch-size must be a multiple of the 2 processes, got 3"):
        main(["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *SMALL, "--batch-size", "3"])


def test_bad_files_are_named_counted_and_left_out(synthetic_tree, tmp_path, caplog):
    tree = tmp_path / "data"
    tree.mkdir()
    for path in synthetic_tree.rglob("*.png"):
        (tree / path.name).write_bytes(path.read_bytes())
    broken = sorted(tree.iterdir())[5:8]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(broken[1].read_bytes()[:1000])
    broken[2].write_text("not an image")
    broken.append(tree / "figure.png")
    Image.new("RGB", (40, 40)).save(broken[3])
    arguments = ["--data-dir", str(tree), "--output-dir", str(tmp_path / "out"), *SMALL]
    (metrics,) = main(arguments)
    assert sum(metrics["n_images"].values()) == 45
    for path in broken:
        assert sum(str(path) in message for message in caplog.messages) == 1
    unusable = "1 misnamed files, and 3 of 48 images that cannot be read"
    assert f"WARNING: left out {unusable}" in caplog.messages
    with pytest.raises(SystemExit, match=f"data_dir must hold usable images alone with --strict, got {unusable}"):
        main([*arguments, "--overwrite", "--strict"])


def test_shuffled_labels_give_chance(synthetic_tree, tmp_path):
    """With patients' labels drawn at random, nothing that a model learns helps with new patients."""
    rng, scores = random.Random(0), []
    for trial in range(3):
        tree = tmp_path / str(trial)
        tree.mkdir()
        paths = sorted(synthetic_tree.rglob("*.png"))
        patients = sorted({tuple(path.name.split("-")[:3]) for path in paths})
        shuffled = patients.copy()
        rng.shuffle(shuffled)
        new_name = dict(zip(patients, shuffled, strict=True))
        for path in paths:
            parts = path.name.split("-")
            (tree / "-".join([*new_name[tuple(parts[:3])], *parts[3:]])).symlink_to(path)
        for fold in range(3):
            arguments = ["--folds", str(fold), "--img-size", "32", "--lr", "1e-3", "--epochs", "4"]
            arguments += ["--model", "test_convnext", "--overwrite"]
            (metrics,) = main(["--data-dir", str(tree), "--output-dir", str(tmp_path / "out"), *TWO_EPOCHS, *arguments])
            scores.append(metrics["balanced_accuracy"])
    # 72 patients, whose rates have a standard deviation of about 0.4: four standard errors are 0.2.
    assert sum(scores) / len(scores) == pytest.approx(0.5, abs=0.2)


def test_a_study_makes_tables_and_resumes(synthetic_tree, tmp_path, caplog, capsys):
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *TWO_EPOCHS, "--img-size", "32"]
    arguments += [*NARROW, "--ablation", "--folds", "0", "1", "--epochs", "1", "--resume"]
    runs = main(arguments)
    assert len(runs) == 8
    tables = (tmp_path / "results.md").read_text()
    assert tables.strip() in capsys.readouterr().out
    caplog.clear()
    assert main(arguments) == runs
    assert sum(message.endswith("is finished") for message in caplog.messages) == 8
    assert (tmp_path / "results.md").read_text() == tables
    with pytest.raises(
        SystemExit, match=r"--resume must go on with the flags that .* was started with: lr was 0.0001, now"
    ):
        main([*arguments, "--lr", "0.5"])


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_train(recipe, synthetic_tree, tmp_path):
    """Train without the weights, which would be downloaded."""
    arguments = ["--config", str(recipe), "--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *TWO_EPOCHS]
    (metrics,) = main([*arguments, "--no-pretrained"])
    assert all(math.isfinite(row["train_loss"]) for row in metrics["history"])
    assert metrics["flags"]["layer_decay"] < 1
