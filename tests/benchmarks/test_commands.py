"""The package as a user meets it: it imports without matplotlib, and each command says what it does."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks

ROOT = Path(__file__).parents[2]
MODULES = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
COMMANDS = ["bench_calls", "bench_layers", "bench_models", "gpu_check", "memory", "report"]
IMPORT_WITHOUT_MATPLOTLIB = """
import importlib, sys
sys.modules["matplotlib"] = None  # importing it now raises an ImportError
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def run_python(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process that can import this checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_every_module_imports_without_matplotlib():
    assert {"plots", "report", "timing"} < set(MODULES)
    process = run_python("-c", IMPORT_WITHOUT_MATPLOTLIB, *(f"benchmarks.{name}" for name in MODULES))
    assert process.returncode == 0, process.stderr


def test_a_module_that_imports_matplotlib_is_noticed(tmp_path):
    (tmp_path / "figures.py").write_text("from matplotlib.figure import Figure\n")
    process = run_python("-c", IMPORT_WITHOUT_MATPLOTLIB, "figures", folder=tmp_path)
    assert process.returncode == 1
    assert "ModuleNotFoundError: No module named 'matplotlib" in process.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_what_it_does_and_names_no_folder_of_this_machine(name, monkeypatch, capsys):
    command = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        command.main()
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m benchmarks.{name} ")
    assert command.__doc__.strip().splitlines()[0] in text
    assert str(ROOT) not in text


def test_a_command_runs_from_the_root_of_a_checkout():
    process = run_python("-m", "benchmarks.report", "--help")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("usage: python -m benchmarks.report ")


def test_the_commands_and_no_other_modules_are_in_the_readme():
    readme = (ROOT / "benchmarks/README.md").read_text()
    for name in MODULES:
        assert (f"python -m benchmarks.{name}" in readme) == (name in COMMANDS), name
