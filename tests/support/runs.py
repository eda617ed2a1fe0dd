"""Runs of the BreakHis example: small flags, and reading results without the code of the example."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
SMALL = ["--img-size", "64", "--epochs", "1", "--batch-size", "8", "--num-workers", "0", "--num-folds", "3"]
TWO_EPOCHS = [*SMALL, "--epochs", "2"]
NARROW = ["--model-kwargs", "{depths: [1, 1, 1, 1], dims: [16, 32, 48, 64]}"]
"""A KFDE model with every part, which trains in a quarter of the time."""
BINARY, SUBTYPES = ["benign", "malignant"], ["A", "F", "PT", "TA", "DC", "LC", "MC", "PC"]


def heed_interrupts() -> None:
    """Undo, in a child process, that a shell lets the processes in its background ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load_with_timm(folder: Path) -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    """Load a saved model and its transform with timm alone."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)


def load_input(transform: Callable[[Image.Image], Tensor], path: Path) -> Tensor:
    """Load an image as the input of a model, (1, 3, H, W)."""
    with Image.open(path) as file:
        return transform(file.convert("RGB"))[None]


def predict_with_timm(folder: Path, path: Path) -> Tensor:
    """Compute the probabilities of an image with timm alone."""
    model, transform = load_with_timm(folder)
    with torch.inference_mode():
        return model(load_input(transform, path)).softmax(1)[0]


def launch(
    out: Path, processes: int, *arguments: str, script: Path = ROOT / "examples/train_breakhis.py"
) -> subprocess.CompletedProcess[str]:
    """Run a script, by default the one that trains, with `accelerate launch`, on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--multi_gpu"] if processes > 1 else ["--cpu"]  # several processes need this flag on any device
    command += [str(script), "--output-dir", str(out), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def run_and_terminate(arguments: list[str], after: Path) -> tuple[int, str]:
    """Return exit status and errors of the script, which is terminated when a file is there."""
    command = [sys.executable, str(ROOT / "examples" / "train_breakhis.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, preexec_fn=heed_interrupts, **pipes)
    deadline = time.monotonic() + 120
    while not after.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors
