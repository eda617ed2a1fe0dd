from pathlib import Path

import numpy as np
import predict_breakhis
import pytest
import timm
import torch
from breakhis.results.explain import as_picture, grad_cam, overlay
from breakhis.training.checkpoints import save_model
from PIL import Image
from predict_breakhis import main, patient_votes

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
        ({"--batch-size": "0"}, "argument --batch-size: must be at least 1, got 0"),
        ({"--num-workers": "-1"}, "argument --num-workers: must be at least 0, got -1"),
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


def test_a_checkpoint_without_weights_is_refused(checkpoint, images, tmp_path, capsys):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "half", images, tmp_path / "out.csv"))
    assert "argument --checkpoint: must be a folder with model.safetensors, got" in capsys.readouterr().err
