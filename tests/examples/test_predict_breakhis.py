import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import predict_breakhis
import pytest
import timm
import torch
from breakhis.files import read_csv, write_csv
from breakhis.results.explain import as_picture, grad_cam, overlay
from breakhis.training.checkpoints import save_model
from PIL import Image
from predict_breakhis import main, patient_votes
from safetensors.torch import load_file, save_file

from tests.support.hub import needs_local_dir
from tests.support.runs import load_input, load_with_timm, predict_with_timm, read_rows

pytestmark = needs_local_dir
CLASSES = ["A", "F", "DC"]
QUIET = ["--num-workers", "0", "--batch-size", "2", "--device", "cpu"]


def save_checkpoint(folder: Path, name: str) -> Path:
    """Save a timm model with random weights."""
    torch.manual_seed(0)
    config = {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "center"}
    model = timm.create_model(name, num_classes=len(CLASSES), pretrained_cfg_overlay=config)
    with torch.no_grad():
        model.get_classifier().weight.mul_(20)  # so that the images get different predictions
    save_model(model, folder, CLASSES, {})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "kfde_convnextv2_atto")


@pytest.fixture
def images(tmp_path) -> Path:
    """Write seven images: five of three patients, in three file formats, and two without a patient."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    names = [
        "SOB_B_A-14-1-100-001.png",
        "deep/er/SOB_B_A-14-1-400-002.png",
        "deep/SOB_B_A-14-1-400-003.jpg",
        "SOB_M_DC-14-2-40-001.png",
        "SOB_M_DC-14-3AB-40-001.tif",
        "deep/field one.png",
        "deep/field one.jpg",
    ]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        colours = rng.integers(255, size=(3, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((70, 46), Image.Resampling.BICUBIC).save(root / name)
    return root


def arguments(checkpoint: Path, images: Path, output: Path, *more: str) -> list[str]:
    """Make the command line."""
    return ["--checkpoint", str(checkpoint), "--images", str(images), "--output", str(output), *QUIET, *more]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_every_image_is_predicted_as_by_timm_alone(checkpoint, images, tmp_path, workers):
    output = tmp_path / "new" / "predictions.csv"
    assert main(arguments(checkpoint, images, output, "--num-workers", workers)) == 0
    rows = read_rows(output)
    assert list(rows[0]) == ["file", "patient", "prediction", "prob_A", "prob_F", "prob_DC"]
    assert {row["file"]: row["patient"] for row in rows} == {
        "SOB_B_A-14-1-100-001.png": "14-1",
        "deep/er/SOB_B_A-14-1-400-002.png": "14-1",
        "deep/SOB_B_A-14-1-400-003.jpg": "14-1",
        "SOB_M_DC-14-2-40-001.png": "14-2",
        "SOB_M_DC-14-3AB-40-001.tif": "14-3AB",
        "deep/field one.png": "",
        "deep/field one.jpg": "",
    }
    assert len(rows) == 7
    for row in rows:
        written = torch.tensor([float(row[f"prob_{name}"]) for name in CLASSES])
        torch.testing.assert_close(written, predict_with_timm(checkpoint, images / row["file"]), atol=1e-5, rtol=1e-4)
        assert row["prediction"] == CLASSES[written.argmax()]
    assert len({row["prediction"] for row in rows}) > 1


def test_patients_vote(checkpoint, images, tmp_path):
    assert main(arguments(checkpoint, images, tmp_path / "out.csv")) == 0
    rows, votes = read_rows(tmp_path / "out.csv"), read_rows(tmp_path / "out_patients.csv")
    assert [(vote["patient"], vote["n_images"]) for vote in votes] == [("14-1", "3"), ("14-2", "1"), ("14-3AB", "1")]
    for vote in votes:
        images_of_patient = [row for row in rows if row["patient"] == vote["patient"]]
        means = {
            name: sum(float(row[f"prob_{name}"]) for row in images_of_patient) / len(images_of_patient)
            for name in CLASSES
        }
        assert {name: float(vote[f"prob_{name}"]) for name in CLASSES} == pytest.approx(means)
        assert vote["prediction"] == max(means, key=means.__getitem__)
        hits = [row["prediction"] == vote["majority"] for row in images_of_patient]
        assert float(vote["majority_share"]) == pytest.approx(sum(hits) / len(hits))


def test_votes_by_hand():
    probabilities = np.array([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.7, 0.3], [0.2, 0.8]])
    first, second = patient_votes(["b", "b", "b", "a", "a"], probabilities, ["benign", "malignant"])[::-1]
    # Two of three images are benign, but the third is so clearly malignant that the mean follows it.
    assert (first["patient"], first["n_images"], first["prediction"], first["majority"]) == (
        "b",
        3,
        "malignant",
        "benign",
    )
    assert first["majority_share"] == pytest.approx(2 / 3)
    assert float(first["prob_benign"]) == pytest.approx(1.3 / 3)
    # One against one: the larger mean decides.
    assert (second["patient"], second["majority"], second["majority_share"]) == ("a", "malignant", 0.5)


def test_there_is_no_vote_without_a_patient(checkpoint, images, tmp_path):
    assert main(arguments(checkpoint, images / "deep" / "er", tmp_path / "one.csv")) == 0
    assert (tmp_path / "one_patients.csv").is_file()
    for path in images.rglob("SOB_*"):
        path.unlink()
    assert main(arguments(checkpoint, images, tmp_path / "none.csv")) == 0
    assert [row["file"] for row in read_rows(tmp_path / "none.csv")] == ["deep/field one.jpg", "deep/field one.png"]
    assert not (tmp_path / "none_patients.csv").exists()


def test_bad_files_are_named_skipped_and_counted(checkpoint, images, tmp_path, caplog):
    good = (images / "SOB_B_A-14-1-100-001.png").read_bytes()
    (images / "cut.png").write_bytes(good[: len(good) // 2])
    (images / "deep" / "empty.png").write_bytes(b"")
    (images / "words.jpg").write_text("not an image")
    (images / "notes.txt").write_text("no suffix of an image")
    assert main(arguments(checkpoint, images, tmp_path / "out.csv")) == 0
    skipped = [message for message in caplog.messages if message.startswith("skipped ")]
    assert [line.split(":")[0] for line in skipped] == [
        "skipped cut.png",
        "skipped deep/empty.png",
        "skipped words.jpg",
    ]
    assert all(len(line.splitlines()) == 1 for line in skipped)
    assert "7 images, 3 skipped" in caplog.messages
    assert len(read_rows(tmp_path / "out.csv")) == 7


def test_nothing_to_predict_is_an_error(checkpoint, tmp_path, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "bad.png").write_text("not an image")
    assert main(arguments(checkpoint, folder, tmp_path / "out.csv")) == 2
    assert f"argument --images: must hold an image that can be used, got none in {str(folder)!r}" in caplog.messages
    assert not (tmp_path / "out.csv").exists()


def test_each_image_has_its_overlay(checkpoint, images, tmp_path):
    cams = tmp_path / "cams"
    assert main(arguments(checkpoint, images, tmp_path / "out.csv", "--cam-dir", str(cams))) == 0
    rows = read_rows(tmp_path / "out.csv")
    files = {path.relative_to(cams).as_posix() for path in cams.rglob("*") if path.is_file()}
    assert files == {f"{row['file']}.png" for row in rows}
    model, transform = load_with_timm(checkpoint)
    for row in rows:
        inputs = load_input(transform, images / row["file"])
        (cam,) = grad_cam(model, inputs, [CLASSES.index(row["prediction"])])
        with Image.open(cams / f"{row['file']}.png") as written:
            assert written.size == (64, 64)
            expected = np.asarray(overlay(as_picture(model, inputs[0]), cam)).astype(int)
            assert np.abs(np.asarray(written) - expected).mean() < 0.5


def test_a_model_of_timm_without_kfde(images, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "resnet", "resnet10t")
    cams = tmp_path / "cams"
    assert main(arguments(checkpoint, images, tmp_path / "out.csv", "--cam-dir", str(cams))) == 0
    for row in read_rows(tmp_path / "out.csv"):
        written = torch.tensor([float(row[f"prob_{name}"]) for name in CLASSES])
        torch.testing.assert_close(written, predict_with_timm(checkpoint, images / row["file"]), atol=1e-5, rtol=1e-4)
    assert len(list(cams.rglob("*.png"))) == 7


def test_a_model_without_maps_is_refused_before_it_runs(checkpoint, images, tmp_path, caplog, monkeypatch):
    def without_map(model):
        raise ValueError("model must have a map")

    monkeypatch.setattr(predict_breakhis, "cam_target", without_map)
    assert main(arguments(checkpoint, images, tmp_path / "out.csv", "--cam-dir", str(tmp_path / "cams"))) == 2
    assert "argument --cam-dir: model must have a map" in caplog.messages
    assert not (tmp_path / "out.csv").exists()


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


def test_a_checkpoint_without_weights_is_refused(checkpoint, images, tmp_path, capsys):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "half", images, tmp_path / "out.csv"))
    assert "argument --checkpoint: must be a folder with model.safetensors, got" in capsys.readouterr().err


@pytest.fixture
def nothing_computed(monkeypatch):
    """Fail if an image is opened."""
    monkeypatch.setattr(predict_breakhis, "find_faults", lambda paths: pytest.fail("opened images"))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHER_TABLE = "must not replace a file that is no earlier table of this script"


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


def test_an_earlier_table_is_replaced(checkpoint, images, tmp_path):
    output = images / "predictions.csv"
    for _ in range(2):
        assert main(arguments(checkpoint, images, output)) == 0
        assert len(read_rows(output)) == 7
    assert {path.name for path in images.glob("*.csv")} == {"predictions.csv", "predictions_patients.csv"}
    assert not list(images.rglob("*.part"))


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("link", [lambda target, path: os.link(target, path), os.symlink], ids=["hard", "soft"])
@pytest.mark.parametrize("target", ["images/deep/field one.jpg", "checkpoint/config.json"])
def test_no_input_is_replaced_by_an_overlay(checkpoint, images, tmp_path, caplog, link, target):
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (tmp_path / "cams/deep").mkdir(parents=True)
    link(tmp_path / target, tmp_path / "cams/deep/field one.png.png")
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


NAMES = [b"f\xe4rbung.png", b"\x1b[31mred\x07\n.png", b"=1+1.png", b"'a.png", b"x" * 251 + b".png"]
NAMES += ["größe.png".encode()]


def test_any_name_is_predicted_and_read_back(checkpoint, images, tmp_path, caplog):
    for name in NAMES:
        shutil.copy(images / "deep/field one.png", os.fsencode(images / "deep") + b"/" + name)
    with open(os.fsencode(images) + b"/\x1b[2J\xe4.png", "wb") as file:
        file.write(b"broken")
    cams = tmp_path / "cams"
    assert main(arguments(checkpoint, images, tmp_path / "out.csv", "--cam-dir", str(cams))) == 0
    rows = read_csv(tmp_path / "out.csv")
    assert {os.fsencode(row["file"]) for row in rows} >= {b"deep/" + name for name in NAMES}
    assert len(rows) == 7 + len(NAMES)
    overlays = [os.fsencode(path.relative_to(cams)) for path in cams.rglob("*.png")]
    assert len(overlays) == len(rows)
    assert b"deep/f\xe4rbung.png.png" in overlays
    assert r"skipped \x1b[2J\udce4.png: it is not a BMP, JPEG, PNG or TIFF image" in caplog.messages
    assert all(message.isprintable() for message in caplog.messages)


def test_formulas_are_text_in_the_table(checkpoint, images, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    shutil.copy(images / "deep/field one.png", folder / "=HYPERLINK(1).png")
    assert main(arguments(checkpoint, folder, tmp_path / "out.csv")) == 0
    assert [row["file"] for row in read_rows(tmp_path / "out.csv")] == ["'=HYPERLINK(1).png"]
    assert [row["file"] for row in read_csv(tmp_path / "out.csv")] == ["=HYPERLINK(1).png"]


def test_links_are_followed_and_special_files_skipped(checkpoint, images, tmp_path, caplog):
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "there").symlink_to(images / "deep")
    (folder / "again").symlink_to(images / "deep")
    (folder / "up").symlink_to(folder)
    (folder / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    assert main(arguments(checkpoint, folder, tmp_path / "out.csv")) == 0
    assert [row["file"] for row in read_rows(tmp_path / "out.csv")] == [
        *("again/SOB_B_A-14-1-400-003.jpg", "again/er/SOB_B_A-14-1-400-002.png"),
        *("again/field one.jpg", "again/field one.png"),
    ]
    assert "skipped gone.png: it is a link to nothing" in caplog.messages
    assert "skipped pipe.png: it is a pipe, not a file" in caplog.messages
    assert "4 images, 2 skipped" in caplog.messages


def test_probabilities_hardly_depend_on_the_batch(checkpoint, images, tmp_path):
    tables = []
    for size in ("1", "3", "7"):
        assert main(arguments(checkpoint, images, tmp_path / f"{size}.csv", "--batch-size", size)) == 0
        rows = read_rows(tmp_path / f"{size}.csv")
        tables.append([[float(row[f"prob_{name}"]) for name in CLASSES] for row in rows])
    assert np.abs(np.array(tables) - tables[0]).max() <= 1e-6


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


def test_an_overlay_that_cannot_be_written_costs_no_predictions(checkpoint, images, tmp_path, caplog):
    cams = tmp_path / "cams"
    (cams / "SOB_M_DC-14-2-40-001.png.png/full").mkdir(parents=True)
    assert main(arguments(checkpoint, images, tmp_path / "out.csv", "--cam-dir", str(cams))) == 0
    assert len(read_rows(tmp_path / "out.csv")) == 7
    assert f"WARNING: no Grad-CAM in {cams}/SOB_M_DC-14-2-40-001.png.png: Is a directory" in caplog.messages
    assert len([path for path in cams.rglob("*") if path.is_file()]) == 6


def test_an_overlay_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path, picture = tmp_path / "cam.png", Image.new("RGB", (8, 8))
    predict_breakhis.draw_overlay(picture, path)
    before = contents(tmp_path)

    def write_half(file: Path, kind: str) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture, "save", write_half)
    predict_breakhis.draw_overlay(picture, path)
    assert contents(tmp_path) == before


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


def test_a_full_disk_leaves_nothing_behind(checkpoint, images, tmp_path, monkeypatch):
    """A limit on the size of a file stands for the disk: the system's error comes in the middle of the table."""

    def write_with_limit(path: Path, rows: list[dict[str, str]]) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # Python ignores the signal that this can send
        try:
            write_csv(path, rows)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(predict_breakhis, "write_csv", write_with_limit)
    with pytest.raises(SystemExit, match=r"^predict_breakhis.py: error: \[Errno 27\] File too large$"):
        main(arguments(checkpoint, images, tmp_path / "out" / "out.csv"))
    assert list((tmp_path / "out").iterdir()) == []
