"""Runs on images that are drawn, fetched, divided or damaged in some way."""

import functools
import os
import random
import shutil
from pathlib import Path

import pytest
from breakhis.data.splits import LEAK_WARNING
from breakhis.data.synthetic import draw_tree
from PIL import Image
from train_breakhis import main

from tests.support.runs import NARROW, SMALL, TWO_EPOCHS, read_rows
from tests.support.trained import assert_consistent, assert_figures

pytestmark = pytest.mark.slow  # nearly every test trains a model


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
    monkeypatch.setattr("breakhis.chosen.draw_tree", draw_few)
    main(["--synthetic", "--magnification", "400X", "--output-dir", str(tmp_path), *SMALL])
    metrics = assert_consistent(tmp_path, tmp_path / "synthetic", leak_checker)
    assert sum(metrics["n_images"].values()) == 16
    assert "case protocol, fold 0 of 3, synthetic images 400X, binary: image accuracy" in capsys.readouterr().out


def test_download_comes_before_everything(synthetic_tree, tmp_path, monkeypatch, leak_checker):
    hashes = []

    def download(directory: Path, sha256: str | None) -> None:
        """Put the images into a folder whose name is no UTF-8, and link to it."""
        hashes.append(sha256)
        directory.mkdir()
        shutil.copytree(synthetic_tree, tmp_path / os.fsdecode(b"f\xe4rbung"))
        (directory / os.fsdecode(b"l\xefnk")).symlink_to(tmp_path / os.fsdecode(b"f\xe4rbung"))

    monkeypatch.setattr("breakhis.chosen.download", download)
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


def test_settings_are_chosen_without_the_test_images(synthetic_tree, tmp_path, capsys):
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *TWO_EPOCHS, "--score-on", "val"]
    (metrics,) = main(arguments)
    assert "case protocol, validation, fold 0 of 3, breakhis 100X, binary" in capsys.readouterr().out
    split = {row["file"]: row["split"] for row in read_rows(tmp_path / "split.csv")}
    assert {split[row["file"]] for row in read_rows(tmp_path / "predictions.csv")} == {"val"}
    best = metrics["history"][metrics["best_epoch"] - 1]
    assert metrics["balanced_accuracy"] == pytest.approx(best["val_balanced_accuracy"])


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
        arguments = ["--folds", "all", "--img-size", "32", "--lr", "1e-3", "--epochs", "4", "--model", "test_convnext"]
        runs = main(["--data-dir", str(tree), "--output-dir", f"{tree}-out", *TWO_EPOCHS, *arguments])
        scores += [run["balanced_accuracy"] for run in runs]
    assert len(scores) == 9
    # 72 patients, whose rates have a standard deviation of about 0.4: four standard errors are 0.2.
    assert sum(scores) / len(scores) == pytest.approx(0.5, abs=0.2)
