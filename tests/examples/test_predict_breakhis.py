"""Predictions, votes and overlays, against timm alone."""

import numpy as np
import predict_breakhis
import pytest
import torch
from breakhis.results.explain import grad_cam
from breakhis.results.maps import draw_map
from PIL import Image
from predict_breakhis import main, patient_votes

from tests.support.predictions import CLASSES, arguments, save_checkpoint, write_images
from tests.support.runs import load_input, load_with_timm, predict_with_timm, read_rows


@pytest.mark.slow
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


def test_a_model_of_timm_without_kfde(images, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "resnet", "resnet10t")
    cams = tmp_path / "cams"
    assert main(arguments(checkpoint, images, tmp_path / "out.csv", "--cam-dir", str(cams))) == 0
    for row in read_rows(tmp_path / "out.csv"):
        written = torch.tensor([float(row[f"prob_{name}"]) for name in CLASSES])
        torch.testing.assert_close(written, predict_with_timm(checkpoint, images / row["file"]), atol=1e-5, rtol=1e-4)
    assert len(list(cams.rglob("*.png"))) == 7


def test_probabilities_hardly_depend_on_the_batch(checkpoint, images, tmp_path):
    tables = []
    for size in ("1", "3", "7"):
        assert main(arguments(checkpoint, images, tmp_path / f"{size}.csv", "--batch-size", size)) == 0
        rows = read_rows(tmp_path / f"{size}.csv")
        tables.append([[float(row[f"prob_{name}"]) for name in CLASSES] for row in rows])
    assert np.abs(np.array(tables) - tables[0]).max() <= 1e-6


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


@pytest.fixture(scope="module")
def explained(checkpoint, tmp_path_factory):
    """Predict with maps; return the folder of the images, the rows, and what each file was drawn from."""
    out = tmp_path_factory.mktemp("explained")
    images, drawn = write_images(out / "images"), {}

    def keep(field, shown, scale, heading, path):
        drawn[path.relative_to(out / "cams").as_posix()] = (field, shown, scale, heading)
        draw_map(field, shown, scale, heading, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_breakhis, "draw_map", keep)
        assert main(arguments(checkpoint, images, out / "out.csv", "--cam-dir", str(out / "cams"))) == 0
    assert {path.relative_to(out / "cams").as_posix() for path in (out / "cams").rglob("*.*")} == set(drawn)
    return images, read_rows(out / "out.csv"), drawn


FILES = {
    "SOB_B_A-14-1-100-001.png": "SOB_B_A-14-1-100-001.png",
    "deep/er/SOB_B_A-14-1-400-002.png": "deep/er/SOB_B_A-14-1-400-002.png",
    "deep/SOB_B_A-14-1-400-003.jpg": "deep/SOB_B_A-14-1-400-003.png",
    "SOB_M_DC-14-2-40-001.png": "SOB_M_DC-14-2-40-001.png",
    "SOB_M_DC-14-3AB-40-001.tif": "SOB_M_DC-14-3AB-40-001.png",
    "deep/field one.png": "deep/field one-png.png",
    "deep/field one.jpg": "deep/field one-jpg.png",
}


@pytest.mark.slow
def test_each_image_has_a_map_over_the_whole_field(checkpoint, explained):
    images, rows, drawn = explained
    assert set(drawn) == {FILES[row["file"]] for row in rows}
    model, transform = load_with_timm(checkpoint)
    for row in rows:
        field, shown, _, _ = drawn[FILES[row["file"]]]
        with Image.open(images / row["file"]) as original:
            np.testing.assert_array_equal(np.asarray(field), np.asarray(original.convert("RGB")))
        assert shown.size == (70, 46)
        assert shown.seen == pytest.approx((12, 0, 58, 46), abs=46 / 64)  # the centre square
        inputs = load_input(transform, images / row["file"])
        (cells,) = grad_cam(model, inputs, [CLASSES.index(row["prediction"])])
        assert shown.cells.shape == cells.shape == (2, 2)
        np.testing.assert_allclose(shown.cells, cells, atol=1e-3 * cells.max())


@pytest.mark.slow
def test_each_map_names_the_prediction_and_all_have_one_scale(explained):
    _, rows, drawn = explained
    names = {"A": "A adenosis", "F": "F fibroadenoma", "DC": "DC ductal carcinoma"}
    for row in rows:
        _, _, scale, heading = drawn[FILES[row["file"]]]
        probability = float(row[f"prob_{row['prediction']}"])
        assert heading.title == f"Prediction: {names[row['prediction']]}, probability {probability:.2f}"
        assert heading.subtitle == f"{row['file']}, Grad-CAM of the predicted class, one scale for all images"
        assert scale == max(shown.cells.max() for _, shown, _, _ in drawn.values())
