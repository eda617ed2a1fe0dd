"""The examples of one file, each run as a script."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("insert_into_resnet", "train_loop", "compare_impls")
pytestmark = pytest.mark.slow


@pytest.fixture
def run(capsys):
    """Return a function that runs an example as a script, and returns what it prints."""

    def run_script(name: str) -> str:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def test_insertion_adds_parameters_and_keeps_the_outputs(run):
    text = run("insert_into_resnet")
    assert "layer3: 256 channels, NCHW, 1/16 of the image's side" in text
    before, after = (
        int(number.replace(",", "")) for number in re.findall(r"[\d,]+\d", text.split("parameters: ")[1])[:2]
    )
    assert after > before > 10_000_000
    assert "largest change of the outputs: 0\n" in text


def test_the_loss_of_the_training_loop_falls(run):
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", run("train_loop"))]
    assert len(losses) == 7
    assert losses[-1] < 0.5 * losses[0]


def test_the_implementations_agree_and_are_timed(run):
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
