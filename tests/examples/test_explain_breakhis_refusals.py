"""Runs, images, outputs and flags that are refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import explain_breakhis
import pytest
from breakhis.training.checkpoints import hash_checkpoint
from explain_breakhis import main
from safetensors.torch import load_file, save_file

from tests.support.explained import change_metrics, explain, write_run
from tests.support.runs import contents, read_rows


@pytest.fixture
def make_run(synthetic_tree, tmp_path) -> Callable[..., Path]:
    return partial(write_run, tmp_path / "out", synthetic_tree)


def shift_weights(run: Path) -> None:
    """Put other weights of the same model in their place."""
    weights = load_file(run / "best/model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, run / "best/model.safetensors")


def double_input(run: Path) -> None:
    """Let the model, which takes any size, see larger images than the run."""
    config = json.loads((run / "best/config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 128, 128]
    (run / "best/config.json").write_text(json.dumps(config))


@pytest.fixture
def nothing_computed(monkeypatch):
    """Fail if a model is loaded."""
    monkeypatch.setattr(explain_breakhis, "load_model", lambda folder: pytest.fail("loaded a model"))


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "metrics.json").write_text("{"), "metrics.json must be a mapping in JSON"),
        (lambda run: (run / "metrics.json").write_text("{}"), "metrics.json must be written by train_breakhis.py"),
        (lambda run: (run / "metrics.json").write_bytes(b"\xff"), "metrics.json must be a mapping in JSON"),
        (lambda run: (run / "predictions.csv").write_text("file\na.png\n"), "predictions.csv must have a value for"),
        (lambda run: (run / "predictions.csv").unlink(), " must be the folder of a finished run, with predictions.csv"),
        (lambda run: shutil.rmtree(run / "best"), "best/config.json' must be a file of a finished run, got none"),
        (lambda run: (run / "best/model.safetensors").unlink(), "best/model.safetensors' must be a file of a finished"),
        (lambda run: (run / "results.json").write_text("[1]"), "results.json must be a mapping in JSON"),
        (shift_weights, "/best must be the checkpoint that its run wrote, got another model.safetensors"),
        (double_input, "/best must be the checkpoint that its run wrote, got another config.json"),
        (
            lambda run: change_metrics(run, best_sha256={"config.json": "ab" * 32}),
            "best_sha256 must have 64 hexadecimal digits for each of config.json and model.safetensors of ",
        ),
        (lambda run: change_metrics(run, best_sha256="ab" * 32), "metrics.json must have best_sha256 of type dict"),
        (
            lambda run: (run / "explain").mkdir() or (run / "explain/decisions.csv").write_text("a,b\n"),
            "decisions.csv'",
        ),
    ],
)
def test_what_is_wrong_with_a_run_is_named_before_a_model_is_loaded(make_run, caplog, damage, message):
    run = make_run("resnet10t", "resnet")
    damage(run)
    before = contents(run)
    assert explain(run) == (2, {})
    (line,) = caplog.messages
    assert line.startswith("error: ")
    assert message in line
    assert line.isprintable()
    assert contents(run) == before


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("link", [lambda target, path: os.link(target, path), os.symlink], ids=["hard", "soft"])
@pytest.mark.parametrize("name", ["cam-100X.png", "gates-KFDE-100X.png", "branches-KFDE-100X.png"])
@pytest.mark.parametrize("target", ["image", "best/model.safetensors", "metrics.json"])
def test_no_input_is_replaced_by_a_figure(make_run, synthetic_tree, caplog, link, name, target):
    run = make_run("resnet10t", "resnet")
    (run / "explain").mkdir()
    image = synthetic_tree / read_rows(run / "predictions.csv")[-1]["file"]
    link(image if target == "image" else run / target, run / "explain" / name)
    before = contents(run)
    assert explain(run) == (2, {})
    assert f"error: must not replace an input, got '{run}/explain/{name}', which is the file '" in caplog.text
    assert contents(run) == before


def test_a_model_with_other_classes_than_its_run_is_refused(make_run, caplog):
    run = make_run("resnet10t", "resnet")
    config = json.loads((run / "best/config.json").read_text())
    config["label_names"] = config["label_names"][::-1]
    (run / "best/config.json").write_text(json.dumps(config))
    change_metrics(run, best_sha256=hash_checkpoint(run / "best"))
    assert explain(run) == (2, {})
    assert f"error: {run}/best must have the classes of its run, ['A', 'F'," in caplog.text


def test_missing_images_are_an_error(make_run, tmp_path, caplog):
    study = make_run("resnet10t", "resnet")
    code, drawn = explain(study, "--output-dir", str(tmp_path / "figures"), "--data-dir", str(tmp_path))
    assert (code, drawn) == (2, {})
    assert f"error: path must be an image file, got '{tmp_path}/BreaKHis_v1/" in caplog.text
    code, drawn = explain(study, "--output-dir", str(tmp_path / "figures"), "--data-dir", str(tmp_path / "nowhere"))
    assert (code, drawn) == (2, {})
    assert f"got {str(tmp_path / 'nowhere')!r}" in caplog.text


@pytest.mark.parametrize("unfinished", [True, False])
def test_no_finished_run_is_an_error(tmp_path, caplog, unfinished):
    out = tmp_path / "out"
    if unfinished:
        (out / "runs/KFDE-100X-fold0-seed0").mkdir(parents=True)
        (out / "runs/KFDE-100X-fold0-seed0/config.yaml").write_text("epochs: 1\n")
    assert explain(out) == (2, {})
    message = "--runs must be a directory with a finished run, which has metrics.json, got"
    assert f"{message} {str(out)!r}" in caplog.text
    assert not (out / "explain").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(
            ([flag, str(value)], f"argument {flag}: must be from 1 to 1000000, got {value}")
            for flag in ("--images-per-class", "--max-gate-images")
            for value in (0, -3, 10**6 + 1, 10**30)
        ),
        (["--device", "abacus"], "argument --device: must be 'auto' or a device of this machine, got 'abacus'"),
    ],
)
def test_wrong_arguments_are_named_with_their_values(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        main(["--runs", str(tmp_path), *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
