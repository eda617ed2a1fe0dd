"""Flags, outputs and checkpoints that are refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import predict_breakhis
import pytest
from predict_breakhis import main
from safetensors.torch import load_file, save_file

from tests.support.predictions import arguments
from tests.support.runs import contents

OTHER_TABLE = "must not replace a file that is no earlier table of this script"


@pytest.fixture
def nothing_computed(monkeypatch):
    """Fail if an image is opened."""
    monkeypatch.setattr(predict_breakhis, "find_faults", lambda paths: pytest.fail("opened images"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--checkpoint": "images"}, "argument --checkpoint: must be a folder with config.json, got"),
        ({"--images": "nowhere"}, "argument --images: must be a directory, got"),
        ({"--output": "images"}, "argument --output: must be a file, got the directory"),
        ({"--cam-dir": "images/cams"}, "argument --cam-dir: must not lie below --images"),
        ({"--output": "/proc/out.csv"}, "argument --output: must be in a writable folder, got '/proc'"),
        ({"--cam-dir": "/proc/cams"}, "argument --cam-dir: must be in a writable folder, got '/proc/cams'"),
        *(
            ({"--batch-size": str(value)}, f"argument --batch-size: must be from 1 to 1000000, got {value}")
            for value in (0, 10**6 + 1, 10**30)
        ),
        *(
            ({"--num-workers": str(value)}, f"argument --num-workers: must be from 0 to 256, got {value}")
            for value in (-1, 257, 10**6)
        ),
        ({"--device": "abacus"}, "argument --device: must be 'auto' or a device of this machine, got 'abacus'"),
    ],
)
def test_wrong_arguments_are_named_with_their_values(
    checkpoint, images, tmp_path, monkeypatch, capsys, changes, message
):
    monkeypatch.chdir(tmp_path)
    flags = {"--checkpoint": str(checkpoint), "--images": "images", "--output": "out.csv", **changes}
    with pytest.raises(SystemExit) as stopped:
        main([part for pair in flags.items() for part in pair])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_names_on_the_command_line_are_printed_without_control_characters(checkpoint, images, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(arguments(checkpoint, images, tmp_path / "out.csv", "\x1b[2J.png"))  # as `*` in a shell gives them
    message = capsys.readouterr().err
    assert r"unrecognized arguments: \x1b[2J.png" in message
    assert "\x1b" not in message


def test_nothing_to_predict_is_an_error(checkpoint, tmp_path, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "bad.png").write_text("not an image")
    assert main(arguments(checkpoint, folder, tmp_path / "out.csv")) == 2
    assert f"argument --images: must hold an image that can be used, got none in {str(folder)!r}" in caplog.messages
    assert not (tmp_path / "out.csv").exists()


def test_a_model_without_maps_is_refused_before_it_runs(checkpoint, images, tmp_path, caplog, monkeypatch):
    def without_map(model):
        raise ValueError("model must have a map")

    monkeypatch.setattr(predict_breakhis, "cam_target", without_map)
    assert main(arguments(checkpoint, images, tmp_path / "out.csv", "--cam-dir", str(tmp_path / "cams"))) == 2
    assert "argument --cam-dir: model must have a map" in caplog.messages
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("images/SOB_B_A-14-1-100-001.png", "must be a CSV file, not named like an image"),
        ("images/new.PNG", "must be a CSV file, not named like an image"),
        ("images/notes.txt", OTHER_TABLE),
        ("images/table.csv", OTHER_TABLE),
        ("checkpoint/config.json", OTHER_TABLE),
        ("checkpoint/model.safetensors", OTHER_TABLE),
        ("soft.csv", OTHER_TABLE),
        ("hard.csv", OTHER_TABLE),
        ("weights.csv", OTHER_TABLE),
        ("of_run.csv", OTHER_TABLE),
        ("votes.csv", OTHER_TABLE),  # its votes_patients.csv is no table of votes
        ("pipe.csv", OTHER_TABLE),
        ("x" * 256, "File name too long"),
        ("x" * 247 + ".csv", "File name too long"),  # with _patients
    ],
)
def test_no_input_is_replaced_by_the_table(checkpoint, images, tmp_path, capsys, output, message):
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (images / "notes.txt").write_text("notes")
    (images / "table.csv").write_text("file,label\na.png,benign\n")
    (tmp_path / "soft.csv").symlink_to(images / "deep/field one.png")
    os.link(images / "deep/field one.jpg", tmp_path / "hard.csv")
    os.link(tmp_path / "checkpoint/model.safetensors", tmp_path / "weights.csv")
    (tmp_path / "of_run.csv").write_text("file,patient,target,prediction,prob_A\n")
    (tmp_path / "votes_patients.csv").write_text("patient,age\n")
    os.mkfifo(tmp_path / "pipe.csv")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path / "checkpoint", images, tmp_path / output))
    assert stopped.value.code == 2
    assert f"argument --output: {message}" in capsys.readouterr().err.replace("[Errno 36] ", "")
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("link", [lambda target, path: os.link(target, path), os.symlink], ids=["hard", "soft"])
@pytest.mark.parametrize("target", ["images/deep/field one.jpg", "checkpoint/config.json"])
def test_no_input_is_replaced_by_an_overlay(checkpoint, images, tmp_path, caplog, link, target):
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (tmp_path / "cams/deep").mkdir(parents=True)
    link(tmp_path / target, tmp_path / "cams/deep/field one-png.png")
    before = contents(tmp_path)
    flags = arguments(tmp_path / "checkpoint", images, tmp_path / "out.csv", "--cam-dir", str(tmp_path / "cams"))
    assert main(flags) == 2
    assert "argument --cam-dir: must not replace an input, got '" in caplog.text
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("nothing_computed")
def test_overlays_do_not_lie_among_linked_images(checkpoint, images, tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    (images / "link").symlink_to(tmp_path / "elsewhere")
    cams = tmp_path / "elsewhere/cams"
    assert main(arguments(checkpoint, images, tmp_path / "out.csv", "--cam-dir", str(cams))) == 2
    assert f"argument --cam-dir: must not lie in '{images}/link', whose images are read, got '{cams}'" in caplog.text


def test_a_checkpoint_without_weights_is_refused(checkpoint, images, tmp_path, capsys):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "half", images, tmp_path / "out.csv"))
    assert "argument --checkpoint: must be a folder with model.safetensors, got" in capsys.readouterr().err


def test_scores_that_are_not_finite_are_refused(checkpoint, images, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    weights["head.fc.weight"] *= 1e38  # finite, but their products are not
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(SystemExit) as stopped:
        main(arguments(folder, images, tmp_path / "out.csv"))
    assert stopped.value.code.startswith("predict_breakhis.py: error: scores must be finite, got [")
    assert f"from {folder} for the image {images}/SOB_B_A-14-1-100-001.png" in stopped.value.code
    assert not (tmp_path / "out.csv").exists()


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def change(*keys: str, value: object) -> Callable[[Path], None]:
    """Return a function that changes an entry of `config.json`."""

    def write(folder: Path) -> None:
        config = entry = json.loads((folder / "config.json").read_text())
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "config.json must be a mapping in JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "config.json must be a mapping in JSON"),
        (change("label_names", value=["A"]), "config.json must have 3 different label_names"),
        (change("label_names", value=["A", "A", "F"]), "config.json must have 3 different label_names"),
        (change("pretrained_cfg", "mean", value=[0.5, 0.5]), "config.json must have mean of 3 numbers"),
        (change("pretrained_cfg", "std", value=[0, 1, 1]), "config.json must have std of 3 positive numbers"),
        (change("pretrained_cfg", "input_size", value=[3, 8, 8]), "config.json must have input_size"),
        (change("pretrained_cfg", "input_size", value=[3, 10**6, 10**6]), "config.json must have input_size"),
        (change("pretrained_cfg", "crop_pct", value=0), "config.json must have crop_pct from 0.5 to 1, got 0"),
        (
            change("pretrained_cfg", "crop_mode", value="Center"),
            "config.json must have crop_mode of border, ",
        ),
        (change("num_classes", value=float("nan")), "config.json must have finite numbers, got nan in num_classes"),
        (cut, "model.safetensors must "),
    ],
)
def test_a_broken_checkpoint_ends_in_one_line(checkpoint, images, tmp_path, damage, message):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    damage(folder)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(folder, images, tmp_path / "out.csv"))
    assert stopped.value.code.startswith(f"predict_breakhis.py: error: {folder}/{message}")
    assert stopped.value.code.isprintable()
    assert not (tmp_path / "out.csv").exists()
