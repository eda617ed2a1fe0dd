"""Runs that are killed, and go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from breakhis.training.state import load_state, save_state, write_atomically
from train_breakhis import main

from tests.support.hub import needs_local_dir

ROOT = Path(__file__).parents[2]
RECIPE = ["--img-size", "32", "--epochs", "4", "--num-workers", "0", "--num-folds", "3", "--drop-path", "0.2"]
RECIPE += ["--mixup", "0.3", "--ema-decay", "0.9", "--stain-jitter", "0.2", "--lr", "1e-3", "--resume"]


def run_in_a_process(tree: Path, out: Path, kill_after: float | None = None) -> int:
    """The exit status of a run that is killed some seconds after it has begun to train."""
    command = [sys.executable, str(ROOT / "examples" / "train_breakhis.py"), "--data-dir", str(tree)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--output-dir", str(out), *RECIPE],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if kill_after is not None:
        deadline = time.monotonic() + 120
        while not (out / "config.yaml").is_file() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


@needs_local_dir
def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_had_not_been(synthetic_tree, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    started = time.monotonic()
    assert run_in_a_process(synthetic_tree, whole) == 0
    generator = torch.Generator().manual_seed(0)
    span = (time.monotonic() - started) * 0.6  # about what is left once the libraries are loaded
    statuses = []
    for _ in range(4):
        statuses.append(run_in_a_process(synthetic_tree, broken, span * torch.rand((), generator=generator).item()))
    assert -signal.SIGKILL in statuses
    assert run_in_a_process(synthetic_tree, broken) == 0
    assert run_in_a_process(synthetic_tree, broken) == 0  # finished: nothing is left to do
    for name in ("last", "best"):
        weights = [(out / name / "model.safetensors").read_bytes() for out in (whole, broken)]
        assert weights[0] == weights[1]
    for name in ("predictions.csv", "split.csv"):
        assert (whole / name).read_text() == (broken / name).read_text()
    first, again = (json.loads((out / "metrics.json").read_text()) for out in (whole, broken))
    assert first == again
    files = [{path.relative_to(out) for path in out.rglob("*")} for out in (whole, broken)]
    assert files[0] == files[1]
    assert Path("state.pt") not in files[0]


@needs_local_dir
def test_a_run_goes_on_from_the_state_rather_than_from_the_start(synthetic_tree, tmp_path, monkeypatch, caplog):
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *RECIPE]
    epochs = []

    def stop_in_the_third(accelerator, model, loader, loss_fn, optimizer, scheduler, epoch, *rest):
        epochs.append(epoch)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return train(accelerator, model, loader, loss_fn, optimizer, scheduler, epoch, *rest)

    from breakhis.training.engine import train_one_epoch as train

    monkeypatch.setattr("breakhis.training.fit.train_one_epoch", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    (metrics,) = main(arguments)
    assert epochs == [0, 1, 2, 2, 3]
    assert "resumed after epoch 2" in caplog.messages
    assert [row["epoch"] for row in metrics["history"]] == [1, 2, 3, 4]
    # Without --resume the same directory is begun again.
    epochs.clear()
    monkeypatch.setattr("breakhis.training.fit.train_one_epoch", lambda *rest: epochs.append(rest[6]) or train(*rest))
    main(arguments[:-1])
    assert epochs == [0, 1, 2, 3]


@needs_local_dir
def test_a_run_does_not_go_on_with_images_that_are_divided_otherwise(synthetic_tree, tmp_path, monkeypatch):
    tree, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(synthetic_tree, tree)
    arguments = ["--data-dir", str(tree), "--output-dir", str(out), *RECIPE]

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("breakhis.training.fit.train_one_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    picture = next(tree.rglob("SOB_B_F-*.png"))
    picture.with_name("SOB_B_F-14-999-100-001.png").write_bytes(picture.read_bytes())
    with pytest.raises(SystemExit, match=r"--resume must find the images that .*out was started with, as .*split.csv"):
        main(arguments)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda part: part.write_text("old"))

    def fail(part: Path) -> None:
        part.write_text("half of the new")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"


class Spy:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_state_holds_tensors_and_plain_values_and_runs_no_code(tmp_path, monkeypatch):
    assert load_state(tmp_path / "state.pt") is None
    state = {"model": {"weight": torch.randn(3)}, "history": [{"epoch": 1, "loss": 0.1}], "rank": None}
    save_state(tmp_path / "state.pt", state)
    again = load_state(tmp_path / "state.pt")
    assert torch.equal(again["model"].pop("weight"), state["model"].pop("weight"))
    assert again == state
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Spy()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_state(tmp_path / "state.pt")
    assert not (tmp_path / "executed").exists()
