"""Runs that are killed and go on."""

import hashlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from breakhis.training.checkpoints import check_checkpoint
from breakhis.training.engine import predict, train_one_epoch
from breakhis.training.state import load_state, save_state
from safetensors.torch import load_file, save_file
from train_breakhis import main

from tests.support.fork_server import fork_server, run_and_signal
from tests.support.locks import lock_holder
from tests.support.runs import NARROW, SMALL, read_rows, run_and_terminate

RECIPE = ["--img-size", "32", "--epochs", "4", "--num-workers", "0", "--num-folds", "3", "--drop-path", "0.2"]
RECIPE += [*NARROW, "--mixup", "0.3", "--ema-decay", "0.9", "--stain-jitter", "0.2", "--lr", "1e-3", "--resume"]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    with fork_server() as process:
        yield process


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_had_not_been_killed(server, synthetic_tree, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start = time.monotonic()
    main(["--data-dir", str(synthetic_tree), "--output-dir", str(whole), *RECIPE])
    duration = time.monotonic() - start
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(broken), *RECIPE]
    moments = duration * torch.rand(4, generator=torch.Generator().manual_seed(0)).sort().values
    statuses = []
    for seconds in moments.tolist():
        status, errors = run_and_signal(server, arguments, tmp_path / "errors", seconds, signal.SIGKILL)
        assert status in (0, -signal.SIGKILL), errors
        statuses.append(status)
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
def test_a_run_goes_on_from_the_state_instead_of_the_start(synthetic_tree, tmp_path, monkeypatch, caplog):
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
    with pytest.raises(KeyboardInterrupt) as stopped:
        main(arguments)
    assert stopped.value.__notes__ == [
        f"{tmp_path} has every complete epoch; the same command with --resume goes on from there"
    ]
    assert_refuses_what_is_not_of_this_run(arguments, tmp_path, monkeypatch)
    assert epochs == [0, 1, 2]
    leftovers = [tmp_path / folder / ".0123456789abcdef.part" for folder in (".", "best", "last")]
    for path in leftovers:
        path.touch()
    (metrics,) = main(arguments)
    assert epochs == [0, 1, 2, 2, 3]
    assert not any(path.exists() for path in leftovers)
    assert "resumed after epoch 2" in caplog.messages
    assert [row["epoch"] for row in metrics["history"]] == [1, 2, 3, 4]
    assert_keeps_a_finished_run(arguments[:-1], tmp_path, monkeypatch)
    # A run that is not finished starts again without --resume.
    epochs.clear()
    monkeypatch.setattr("breakhis.training.fit.train_one_epoch", record)
    main(arguments[:-1])
    assert epochs == [0, 1, 2, 3]


def assert_keeps_a_finished_run(arguments: list[str], out: Path, monkeypatch) -> None:
    """Check that a finished run is replaced with --overwrite alone; leave a run that is not finished."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr("breakhis.training.fit.train_one_epoch", lambda *args: pytest.fail("trained"))
    message = rf"^train_breakhis.py: error: --output-dir must have no finished run, got {out} with metrics.json: \S+"
    with pytest.raises(SystemExit, match=message):
        main(arguments)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    monkeypatch.setattr("breakhis.training.fit.train_one_epoch", stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        main([*arguments, "--overwrite"])
    (note,) = stopped.value.__notes__
    assert note.endswith("the same command with --resume instead of --overwrite goes on from there")
    assert not (out / "metrics.json").exists()
    assert not (out / "state.pt").exists()


def assert_refuses_what_is_not_of_this_run(arguments: list[str], out: Path, monkeypatch) -> None:
    """Check that a run with a state on disk does not go on from damaged or foreign files; leave them as they were."""

    def refused(message: str) -> None:
        with pytest.raises(SystemExit, match=rf"^train_breakhis.py: error: .*{message}") as stopped:
            main(arguments)
        assert "\n" not in stopped.value.code
        assert not (out / "run.lock").exists()

    state, path = (out / "state.pt").read_bytes(), out / "state.pt"
    flipped = bytearray(state)
    flipped[len(state) // 2] ^= 1
    content = load_state(path)
    foreign = content | {"identity": content["identity"] | {"seeds": [1]}}
    for damaged, message in (
        (flipped, "state.pt must be a state as this script wrote it, got bytes with another SHA-256"),
        (state[:1000], "state.pt must be a state as this script wrote it, got bytes with another SHA-256"),
        ({key: value for key, value in content.items() if key != "ema"}, "state.pt must be .*, got none of ema"),
        (foreign, r"--resume must go on with what .*state.pt was written with, .*: seeds was \[1\], now \[0\]"),
    ):
        path.write_bytes(damaged) if isinstance(damaged, bytes | bytearray) else save_state(path, damaged)
        refused(message)
    path.write_bytes(state)
    for name in ("config.yaml", "split.csv"):
        (out / name).rename(out / "away")
        refused(f"--resume must find {name} next to state.pt, got none in {out}")
        (out / "away").rename(out / name)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 17)
        refused(r"state.pt was written with, .*: threads \(OMP_NUM_THREADS\) was 1, now 17")


def test_a_run_does_not_go_on_with_another_division_of_the_images(synthetic_tree, tmp_path, monkeypatch):
    tree, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(synthetic_tree, tree)
    arguments = ["--data-dir", str(tree), "--output-dir", str(out), *RECIPE]

    monkeypatch.setattr("breakhis.training.fit.train_one_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    image, another = sorted(tree.rglob("SOB_B_F-*.png"))[:2]
    content = image.read_bytes()
    image.write_bytes(another.read_bytes())
    with pytest.raises(SystemExit, match=rf"as .*split.csv lists them: .*{image.name}: sha256 was '\w+', now '\w+'$"):
        main(arguments)
    image.write_bytes(content)
    image.with_name("SOB_B_F-14-999-100-001.png").write_bytes(image.read_bytes())
    with pytest.raises(SystemExit, match=r"--resume must find the images that .*out was started with, as .*split.csv"):
        main(arguments)


def stop(*args):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_what_changes_during_a_run_is_noticed_before_it_is_scored(synthetic_tree, tmp_path, monkeypatch):
    tree, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(synthetic_tree, tree)
    arguments = ["--data-dir", str(tree), "--output-dir", str(out), *SMALL, "--model", "test_convnext", "--resume"]

    def refused(message: str) -> None:
        with pytest.raises(SystemExit, match=message):
            main(arguments)
        assert not (out / "metrics.json").exists()
        assert not (out / "predictions.csv").exists()

    # The best checkpoint becomes that of another run, after training and before the scores.
    def swap(folder, hashes):
        weights = load_file(folder / "model.safetensors")
        save_file({key: value + 1 for key, value in weights.items()}, folder / "model.safetensors")
        return check_checkpoint(folder, hashes)

    monkeypatch.setattr("breakhis.runner.check_checkpoint", swap)
    refused(rf"{out / 'best'} must be the checkpoint that its run wrote, got another model.safetensors")
    monkeypatch.undo()
    refused(rf"{out / 'best'} must be the checkpoint that its run wrote, got another model.safetensors")
    # The weights of the last epoch are those of the best one.
    shutil.copytree(out / "last", out / "best", dirs_exist_ok=True)

    monkeypatch.setattr("breakhis.runner.draw_figures", lambda *args: None)
    image = tree / next(row["file"] for row in read_rows(out / "split.csv") if row["split"] == "test")
    content = image.read_bytes()

    def replace_image(accelerator, model, loader, checkpoint):
        scores = predict(accelerator, model, loader, checkpoint)
        image.write_bytes(content[:-1] + b"x")
        return scores

    monkeypatch.setattr("breakhis.runner.predict", replace_image)
    refused(rf"the files that a run reads must not change during it, got 1 changed, such as {image}$")
    monkeypatch.undo()
    image.write_bytes(content)

    # Weights that are not finite score nothing.
    def nan_scores(accelerator, model, loader, checkpoint):
        with torch.no_grad():
            model.get_classifier().bias[1] = torch.nan
        return predict(accelerator, model, loader, checkpoint)

    monkeypatch.setattr("breakhis.runner.predict", nan_scores)
    refused(rf"scores must be finite, got \[\S+, nan\] from {out / 'best'} for the image {tree}.*\.png$")
    monkeypatch.undo()
    monkeypatch.setattr("breakhis.runner.draw_figures", lambda *args: None)
    (metrics,) = main(arguments)
    assert metrics["best_sha256"].keys() == {"config.json", "model.safetensors"}


@pytest.mark.slow
def test_a_run_does_not_go_on_from_another_file_of_weights(synthetic_tree, tmp_path, monkeypatch):
    weights, out = tmp_path / "weights.pth", tmp_path / "out"
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(out), *SMALL, "--model", "test_convnext"]
    arguments += ["--checkpoint-path", str(weights), "--resume"]

    def save(seed: int) -> str:
        """Write weights; return their hash."""
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_convnext").state_dict(), weights)
        return hashlib.sha256(weights.read_bytes()).hexdigest()

    def refused(message: str) -> None:
        with pytest.raises(SystemExit, match=message):
            main(arguments)

    digests = [save(0), save(1)]
    other = rf"--resume must go on with .*: checkpoint_sha256 of {weights} was '{digests[0]}', now '"
    save(0)
    with monkeypatch.context() as patch:  # stopped before the first epoch
        patch.setattr("breakhis.training.fit.train_one_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    save(1)
    refused(other + digests[1])
    save(0)
    with monkeypatch.context() as patch:  # replaced while the run trains
        patch.setattr("breakhis.runner.predict", lambda *arguments: (predict(*arguments), save(1))[0])
        refused(rf"the files that a run reads must not change during it, got 1 changed, such as {weights}$")
    assert not (out / "metrics.json").exists()
    assert load_state(out / "state.pt")["identity"]["checkpoint_sha256"] == digests[0]
    save(0)
    (metrics,) = main(arguments)
    assert metrics["flags"]["checkpoint_sha256"] == digests[0]
    save(1)
    refused(other + digests[1])  # a finished run too


def test_a_folder_in_use_is_refused_before_anything_is_written(synthetic_tree, tmp_path):
    with lock_holder(tmp_path) as process:
        names = [path.name for path in tmp_path.iterdir()]
        owner = f"process {process.pid} on"
        with pytest.raises(SystemExit, match=f"--output-dir {tmp_path} must not be in use, but {owner}"):
            main(["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *RECIPE])
        assert [path.name for path in tmp_path.iterdir()] == names


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_says_what_is_saved_and_leaves_no_lock(server, synthetic_tree, tmp_path, number, code):
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *SMALL]
    arguments += ["--epochs", "500", "--model", "test_convnext", "--num-workers", "1"]
    if number == signal.SIGTERM:  # the script itself; the other signal goes to a fork, which starts at once
        status, errors = run_and_terminate(arguments, tmp_path / "state.pt")
    else:
        status, errors = run_and_signal(server, arguments, tmp_path / "errors", 0.1, number, tmp_path / "state.pt")
    word = {143: "terminated", 130: "interrupted"}[code]
    sentence = f"{tmp_path} has every complete epoch; the same command with --resume goes on from there"
    assert (status, errors.splitlines()[-1]) == (code, f"train_breakhis.py: {word}; {sentence}")
    assert "Traceback" not in errors
    assert not (tmp_path / "run.lock").exists()
    assert load_state(tmp_path / "state.pt", ["history"])["history"]
