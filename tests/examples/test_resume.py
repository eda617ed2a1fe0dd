"""Runs that are killed and go on."""

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
from breakhis.training.engine import train_one_epoch
from train_breakhis import main

from tests.support.hub import needs_local_dir

ROOT = Path(__file__).parents[2]
RECIPE = ["--img-size", "32", "--epochs", "4", "--num-workers", "0", "--num-folds", "3", "--drop-path", "0.2"]
RECIPE += ["--mixup", "0.3", "--ema-decay", "0.9", "--stain-jitter", "0.2", "--lr", "1e-3", "--resume"]


def run_and_kill(arguments: list[str], out: Path, seconds: float) -> int:
    """Return the exit status of a run in a process that is killed after some seconds of training."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "train_breakhis.py"), *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "config.yaml").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


@pytest.mark.slow
@needs_local_dir
def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_had_not_been_killed(synthetic_tree, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start = time.monotonic()
    main(["--data-dir", str(synthetic_tree), "--output-dir", str(whole), *RECIPE])
    duration = time.monotonic() - start
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(broken), *RECIPE]
    moments = duration * torch.rand(3, generator=torch.Generator().manual_seed(0))
    statuses = [run_and_kill(arguments, broken, seconds) for seconds in moments.tolist()]
    assert -signal.SIGKILL in statuses
    main(arguments)
    main(arguments)  # finished: there is nothing left to do
    for name in ("last", "best"):
        weights = [(out / name / "model.safetensors").read_bytes() for out in (whole, broken)]
        assert weights[0] == weights[1]
    for name in ("predictions.csv", "split.csv"):
        assert (whole / name).read_text() == (broken / name).read_text()
    first, second = (json.loads((out / "metrics.json").read_text()) for out in (whole, broken))
    assert first == second
    files = [{path.relative_to(out) for path in out.rglob("*")} for out in (whole, broken)]
    assert files[0] == files[1]
    assert Path("state.pt") not in files[0]


@pytest.mark.slow
@needs_local_dir
def test_a_run_goes_on_from_the_state_instead_of_the_start(synthetic_tree, tmp_path, monkeypatch, caplog, no_figures):
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *RECIPE]
    epochs = []

    def record(accelerator, trainer, loader, epoch, names):
        epochs.append(epoch)
        return train_one_epoch(accelerator, trainer, loader, epoch, names)

    def stop_in_the_third(accelerator, trainer, loader, epoch, names):
        if len(epochs) == 2:
            epochs.append(epoch)
            raise KeyboardInterrupt
        return record(accelerator, trainer, loader, epoch, names)

    monkeypatch.setattr("breakhis.training.fit.train_one_epoch", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    (metrics,) = main(arguments)
    assert epochs == [0, 1, 2, 2, 3]
    assert "resumed after epoch 2" in caplog.messages
    assert [row["epoch"] for row in metrics["history"]] == [1, 2, 3, 4]
    # Without --resume, the run in this directory starts again.
    epochs.clear()
    monkeypatch.setattr("breakhis.training.fit.train_one_epoch", record)
    main(arguments[:-1])
    assert epochs == [0, 1, 2, 3]


@needs_local_dir
def test_a_run_does_not_go_on_with_another_division_of_the_images(synthetic_tree, tmp_path, monkeypatch):
    tree, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(synthetic_tree, tree)
    arguments = ["--data-dir", str(tree), "--output-dir", str(out), *RECIPE]

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("breakhis.training.fit.train_one_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    image = next(tree.rglob("SOB_B_F-*.png"))
    image.with_name("SOB_B_F-14-999-100-001.png").write_bytes(image.read_bytes())
    with pytest.raises(SystemExit, match=r"--resume must find the images that .*out was started with, as .*split.csv"):
        main(arguments)
