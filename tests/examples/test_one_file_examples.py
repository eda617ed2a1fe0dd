"""The examples of one file, each run as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("insert_into_resnet", "train_loop", "compare_impls")
pytestmark = pytest.mark.slow


def run(name: str) -> str:
    """Run an example in a fresh process, and return what it prints."""
    process = subprocess.run(
        [sys.executable, f"examples/{name}.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_insertion_adds_parameters_and_keeps_the_outputs():
    text = run("insert_into_resnet")
    assert "layer3: 256 channels, NCHW, 1/16 of the image's side" in text
    before, after = (
        int(number.replace(",", "")) for number in re.findall(r"[\d,]+\d", text.split("parameters: ")[1])[:2]
    )
    assert after > before > 10_000_000
    assert "largest change of the outputs: 0\n" in text


def test_the_loss_of_the_training_loop_falls():
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", run("train_loop"))]
    assert len(losses) == 7
    assert losses[-1] < 0.5 * losses[0]


def test_the_implementations_agree_and_are_timed():
    lines = re.findall(r"(\w+) (\w+): largest difference (\S+), time / reference (\S+)", run("compare_impls"))
    assert [line[:2] for line in lines] == [
        (layer, impl) for layer in ("CFE", "SFE", "CSFE", "MFDF") for impl in ("auto", "fused")
    ]
    for _, _, difference, ratio in lines:
        assert float(difference) < 1e-4
        assert float(ratio) > 0


@pytest.mark.parametrize("name", NAMES)
def test_each_example_is_short_and_in_the_readme(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 60
    assert f"python examples/{name}.py" in (ROOT / "examples/README.md").read_text()
