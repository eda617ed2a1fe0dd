"""The faults to plant fit the code as it is. `python -m tests.faults` plants them."""

import pytest

from tests.faults import ROOT, load_faults

FAULTS = load_faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.wrong.strip()[:40]}")
def test_a_fault_changes_one_place(fault):
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.right) == 1
    assert fault.right != fault.wrong
    assert all((ROOT / path).exists() for path in fault.tests)


def test_every_file_with_code_has_faults():
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kfde_layers").rglob("*.py")}
    without = {file for file in files - {fault.file for fault in FAULTS} if not file.endswith("__init__.py")}
    declarations = {"functional.py", "fused/csfe/options.py", "fused/mfdf/asked.py"}  # nothing but names
    sizes = {f"fused/{family}/cuda/{name}.py" for family in ("csfe", "mfdf") for name in ("tiling", "launch")}
    assert without <= {f"kfde_layers/{name}" for name in declarations | sizes | {"fused/mfdf/cuda/strips.py"}}
    assert len(FAULTS) >= 120
    rooms = {fault.file.split("/")[2] for fault in FAULTS if fault.file.startswith("examples/breakhis")}
    assert rooms == {"baselines", "data", "results", "training", "files.py", "runner.py"}


@pytest.mark.parametrize("script", ["breakhis/runner", "predict_breakhis", "explain_breakhis", "push_to_hub"])
def test_every_script_has_faults(script):
    assert sum(fault.file == f"examples/{script}.py" for fault in FAULTS) >= 2
