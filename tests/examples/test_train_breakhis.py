"""Small runs of the script that trains: their files, any model, studies and recipes."""

import ast
import json
import logging
import math
import re

import pytest
import torch
from breakhis.training import fit
from breakhis.training.engine import train_one_epoch
from safetensors.torch import load_file
from train_breakhis import main

from tests.support.pages import python_blocks, run_block
from tests.support.runs import NARROW, ROOT, SMALL, SUBTYPES, TWO_EPOCHS, read_rows
from tests.support.trained import assert_consistent, assert_figures, assert_timm_reproduces_predictions

pytestmark = pytest.mark.slow  # nearly every test trains a model


README = ROOT / "examples/README.md"


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
        "case protocol",
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
    *_, block = python_blocks(README)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/synthetic").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    row = read_rows(run / "predictions.csv")[0]
    run_block(block, README, {"file": synthetic_tree / row["file"]})
    printed = ast.literal_eval(capsys.readouterr().out)
    assert printed == pytest.approx({name: float(row[f"prob_{name}"]) for name in printed}, abs=1e-5)
    assert len(printed) == 8


def test_a_run_repeats_itself(run, synthetic_tree, tmp_path):
    main(["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), "--task", "subtype", *TWO_EPOCHS])
    assert (tmp_path / "split.csv").read_text() == (run / "split.csv").read_text()
    first, second = read_rows(run / "predictions.csv"), read_rows(tmp_path / "predictions.csv")
    for before, after in zip(first, second, strict=True):
        assert before["file"] == after["file"]
        assert float(before["prob_A"]) == pytest.approx(float(after["prob_A"]), abs=1e-4)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("resnet18", ["--channels-last", "--opt", "sgd", "--ema-decay", "0.9"]),
        ("densenet121", []),
        ("vit_tiny_patch16_224", []),
    ],
)
def test_any_timm_model_trains_and_loads_again(model, flags, synthetic_tree, tmp_path, leak_checker):
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *SMALL, *flags]
    main([*arguments, "--model", model])
    assert_consistent(tmp_path, synthetic_tree, leak_checker)


def test_channels_last_is_the_layout_in_training_and_not_in_the_file(synthetic_tree, tmp_path, monkeypatch):
    layouts = []

    def spy(accelerator, trainer, *args):
        layouts.append(trainer.model.conv1.weight.is_contiguous(memory_format=torch.channels_last))
        return train_one_epoch(accelerator, trainer, *args)

    monkeypatch.setattr(fit, "train_one_epoch", spy)
    arguments = ["--data-dir", str(synthetic_tree), *SMALL, "--img-size", "32", "--model", "resnet18", "--opt", "sgd"]
    for flags in ([], ["--channels-last"]):
        main([*arguments, *flags, "--output-dir", str(tmp_path / f"out{len(flags)}")])
    assert layouts == [False, True]
    contiguous, channels_last = (load_file(tmp_path / f"out{count}/best/model.safetensors") for count in (0, 1))
    for name, weight in contiguous.items():
        torch.testing.assert_close(channels_last[name], weight, rtol=1e-4, atol=1e-6)  # rounding


def test_a_study_makes_tables_and_resumes(synthetic_tree, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, "breakhis")
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *TWO_EPOCHS, "--img-size", "32"]
    arguments += [*NARROW, "--ablation", "--folds", "0", "1", "--epochs", "1", "--resume"]
    runs = main(arguments)
    assert len(runs) == 8
    assert [message for message in caplog.messages if message.startswith("at the speed of this epoch about ")]
    started = [message for message in caplog.messages if message.startswith("run ")]
    assert started[0] == "run 1 of 8: baseline-100X-fold0-seed0"
    assert re.fullmatch(r"run 2 of 8: baseline-100X-fold1-seed0, about [\d:]+ left", started[1])
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


def test_a_leak_is_measured_on_the_same_images(synthetic_tree, tmp_path):
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *SMALL, "--img-size", "32", *NARROW]
    apart, leaked = main([*arguments, "--variants", "{apart: {tested_cases: halved}, leaked: {tested_cases: leaked}}"])
    assert apart["n_images"] == leaked["n_images"]
    assert apart["n_shared"] == 0 < leaked["n_shared"]
    folders = [tmp_path / f"runs/{name}-100X-fold0-seed0/predictions.csv" for name in ("apart", "leaked")]
    files, same = ([row["file"] for row in read_rows(folder)] for folder in folders)
    assert files == same
    tables = (tmp_path / "results.md").read_text()
    assert "| leaked | case protocol, half of each tested case, the other half in training (cases leak) |" in tables
    assert "| apart | case protocol, half of each tested case |" in tables


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_train(recipe, synthetic_tree, tmp_path):
    """Train without the weights, which would be downloaded."""
    arguments = ["--config", str(recipe), "--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *TWO_EPOCHS]
    (metrics,) = main([*arguments, "--no-pretrained"])
    assert all(math.isfinite(row["train_loss"]) for row in metrics["history"])
    assert metrics["flags"]["layer_decay"] < 1
