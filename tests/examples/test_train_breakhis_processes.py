"""Runs with several processes, several batches for an update, or another precision."""

import pytest
from accelerate.state import AcceleratorState
from train_breakhis import main

from tests.support.locks import lock_holder
from tests.support.runs import NARROW, SMALL, TWO_EPOCHS, launch, read_rows
from tests.support.trained import assert_consistent, assert_timm_reproduces_predictions

pytestmark = pytest.mark.slow  # nearly every test trains a model


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


def test_two_processes_stop_at_a_folder_in_use(synthetic_tree, tmp_path):
    with lock_holder(tmp_path) as holder:
        process = launch(tmp_path, 2, "--data-dir", str(synthetic_tree), *SMALL)
    message = f"train_breakhis.py: error: --output-dir {tmp_path} must not be in use, but process {holder.pid} on "
    assert process.returncode != 0
    assert process.stderr.count(message) == 2
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_the_same_as_one(
    synthetic_tree, tmp_path, leak_checker, monkeypatch, capsys, another_accelerator
):
    arguments = ["--data-dir", str(synthetic_tree), *TWO_EPOCHS, *NARROW, "--batch-size", "6", "--class-weights"]
    arguments += ["--ema-decay", "0.9", "--grad-accum-steps", "2"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    main([*arguments, "--output-dir", str(tmp_path / "1")])
    process = launch(tmp_path / "2", 2, *arguments)
    assert process.returncode == 0, process.stderr

    for text in (capsys.readouterr().out, process.stdout):
        assert text.count("case protocol, fold 0 of 3") == 1
    one, two = (assert_consistent(folder, synthetic_tree, leak_checker) for folder in (tmp_path / "1", tmp_path / "2"))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert sum(two["n_images"].values()) == 48
    for before, after in zip(one["history"], two["history"], strict=True):
        assert before == pytest.approx(after, rel=1e-3)
    tables = (read_rows(folder / "predictions.csv") for folder in (tmp_path / "1", tmp_path / "2"))
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


def test_a_batch_that_processes_cannot_share_is_refused(synthetic_tree, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(SystemExit, match="--batch-size must be a multiple of the 2 processes, got 3"):
        main(["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *SMALL, "--batch-size", "3"])
