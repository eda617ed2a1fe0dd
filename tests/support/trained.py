"""Checks of the files of a run against each other and against timm, without the code that wrote them."""

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import timm
import torch
from breakhis.data.naming import find_breakhis
from PIL import Image

from tests.support.runs import SUBTYPES, load_input, load_with_timm, read_rows


def recompute(rows: list[dict[str, str]], classes: list[str]) -> dict[str, object]:
    """Compute the scores of `metrics.json` from the rows of `predictions.csv`, in plain Python."""
    matrix = [[sum(r["target"] == t and r["prediction"] == p for r in rows) for p in classes] for t in classes]
    diagonal = range(len(classes))
    recalls = [matrix[i][i] / sum(matrix[i]) for i in diagonal if sum(matrix[i])]
    f1 = []
    for i in diagonal:
        count = sum(matrix[i]) + sum(matrix[j][i] for j in diagonal)
        if count:
            f1.append(2 * matrix[i][i] / count)
    patients = defaultdict(list)
    for r in rows:
        patients[r["patient"]].append(r["target"] == r["prediction"])
    areas, bins = [], defaultdict(list)
    for name in classes:
        positive = [float(r[f"prob_{name}"]) for r in rows if r["target"] == name]
        negative = [float(r[f"prob_{name}"]) for r in rows if r["target"] != name]
        if positive and negative:
            pairs = [(a > b) + (a == b) / 2 for a in positive for b in negative]
            areas.append(sum(pairs) / len(pairs))
    for r in rows:
        confidence = max(float(r[f"prob_{name}"]) for name in classes)
        bins[math.ceil(confidence * 15)].append(confidence - (r["target"] == r["prediction"]))
    return {
        "auc": sum(areas) / len(areas) if areas else None,
        "ece": sum(abs(sum(gaps)) for gaps in bins.values()) / len(rows),
        "image_accuracy": sum(matrix[i][i] for i in diagonal) / len(rows),
        "patient_recognition_rate": sum(sum(hits) / len(hits) for hits in patients.values()) / len(patients),
        "balanced_accuracy": sum(recalls) / len(recalls),
        "macro_f1": sum(f1) / len(f1),
        "confusion_matrix": matrix,
    }


def assert_consistent(out: Path, data_dir: Path, leak_checker) -> dict:
    """Check every file of a run against the other files; return `metrics.json`."""
    metrics = json.loads((out / "metrics.json").read_text())
    rows, split = read_rows(out / "predictions.csv"), read_rows(out / "split.csv")
    classes = metrics["classes"]
    for key, value in recompute(rows, classes).items():
        assert metrics[key] == (value if key == "confusion_matrix" else pytest.approx(value, abs=1e-6)), key
    files = [row["file"] for row in split]
    records = [record for record in find_breakhis(data_dir).records if record.magnification == metrics["magnification"]]
    assert len(set(files)) == len(files) == len(records)
    assert all((data_dir / file).is_file() for file in files)
    if metrics["protocol"] == "patient":
        assert leak_checker((row["patient"], row["split"]) for row in split) == set()
    for name in ("train", "val", "test"):
        part = [row for row in split if row["split"] == name]
        assert metrics["n_images"][name] == len(part)
        assert metrics["n_patients"][name] == len({row["patient"] for row in part})
        assert metrics["n_cases"][name] == len({row["case"] for row in part})
    assert sorted(row["file"] for row in rows) == sorted(row["file"] for row in split if row["split"] == "test")
    for row in rows:
        probabilities = {name: float(row[f"prob_{name}"]) for name in classes}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(probabilities, key=probabilities.__getitem__)
    for name in ("best", "last"):
        assert (out / name / "model.safetensors").is_file()
        config = json.loads((out / name / "config.json").read_text())
        assert config["num_classes"] == len(classes)
        assert config["label_names"] == classes
    return metrics


def assert_figures(out: Path) -> None:
    for name in ("confusion_matrix.png", "curves.png", "roc.png", "calibration.png"):
        with Image.open(out / name) as figure:
            assert min(figure.size) > 300


def assert_timm_reproduces_predictions(run, synthetic_tree):
    """Check the checkpoint's input, its classes and its predictions with timm alone."""
    model, transform = load_with_timm(run / "best")
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, 64, 64)
    assert (config["crop_pct"], config["crop_mode"]) == (1.0, "center")
    assert model.pretrained_cfg["label_names"] == SUBTYPES
    for row in read_rows(run / "predictions.csv"):
        with torch.inference_mode():
            probabilities = model(load_input(transform, synthetic_tree / row["file"])).softmax(1)[0]
        written = torch.tensor([float(row[f"prob_{name}"]) for name in model.pretrained_cfg["label_names"]])
        torch.testing.assert_close(probabilities, written, atol=1e-5, rtol=1e-4)
