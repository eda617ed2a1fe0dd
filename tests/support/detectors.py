"""Ultralytics without its network, and data sets that its trainers read."""

import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

SIDE = 64  # px
NUM_IMAGES = 4
# a box, a polygon, and a box with two key points; lengths are fractions of the side
LABELS = {"detect": "0 .5 .5 .4 .4", "segment": "0 .2 .2 .8 .2 .8 .8 .2 .8", "pose": "0 .5 .5 .4 .4 .4 .4 .6 .6"}
# for a run of two steps on the CPU, without plots, for which a font would be downloaded
BRIEF = {"epochs": 1, "batch": 2, "nbs": 2, "imgsz": SIDE, "workers": 0, "device": "cpu", "amp": False, "plots": False}


def import_ultralytics(settings: Path) -> ModuleType:
    """Return the library, which reads its settings from a folder and asks no network; skip the test without it."""
    options = {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0", "YOLO_CONFIG_DIR": str(settings)}
    with mock.patch.dict(os.environ, options), np.printoptions(), warnings.catch_warnings():
        library = pytest.importorskip("ultralytics", reason="Ultralytics is not installed")
        warnings.filterwarnings("ignore", "distutils Version classes are deprecated", DeprecationWarning)
        importlib.import_module("thop")  # with which it counts operations
    torch.set_printoptions(profile="default")  # which it has changed, as it has those of NumPy
    # which its trainer would set to the number of cores
    importlib.import_module("ultralytics.utils.torch_utils").NUM_THREADS = torch.get_num_threads()
    return library


def write_data(folder: Path, task: str) -> Path:
    """Write noise with labels for a task of YOLO; return what its trainer takes as `data`."""
    generator = np.random.default_rng(0)

    def write_image(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)

    if task == "classify":
        for index in range(NUM_IMAGES):
            for split in ("train", "val"):
                write_image(folder / split / "ab"[index % 2] / f"{index}.png")
        return folder
    (folder / "labels").mkdir(parents=True)
    for index in range(NUM_IMAGES):
        write_image(folder / "images" / f"{index}.png")
        (folder / "labels" / f"{index}.txt").write_text(LABELS[task])
    lines = [f"path: {folder}", "train: images", "val: images", "names: [a, b]"]
    lines += ["kpt_shape: [2, 2]"] if task == "pose" else []
    (folder / "data.yaml").write_text("\n".join(lines))
    return folder / "data.yaml"


def trainer_of(yolo: Any, insert_blocks: Callable[[nn.Module], object]) -> type:
    """Return the trainer for the task of a YOLO, whose models have blocks."""

    class Trainer(yolo.task_map[yolo.task]["trainer"]):
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            model = super().get_model(cfg, verbose=verbose)
            insert_blocks(model)
            if weights is not None:
                model.load(weights)
            return model

    return Trainer
