"""The modules and models that importing the package loads, each in a fresh process."""

import json
import subprocess
import sys
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow  # a fresh process imports PyTorch and timm


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


class Import(NamedTuple):
    """What importing the package did to a process that had imported its dependencies."""

    modules: list[str]
    """Modules that it loaded."""
    seconds: float
    """Time of the processor."""
    models_before: list[str]
    """Models of the package that timm knew before."""
    models_after: list[str]
    """Models of the package that timm knew after it."""


def import_package() -> Import:
    code = """
import json, sys, time
import torch, timm, einops
modules, models = set(sys.modules), timm.list_models("kfde*")
start = time.process_time()
import kfde_layers
seconds = time.process_time() - start
print(json.dumps([list(set(sys.modules) - modules), seconds, models, timm.list_models("kfde*")]))
"""
    return Import(*json.loads(run(code)))


@pytest.fixture(scope="module")
def imported():
    return import_package()


def test_importing_loads_neither_triton_nor_any_extra(imported):
    assert {name.split(".")[0] for name in imported.modules} <= {"kfde_layers", "torch"}


def test_importing_registers_the_models(imported):
    assert imported.models_before == []
    assert len(imported.models_after) == 9


def test_importing_costs_little_over_timm(imported):
    # s; timm itself takes several. A busy machine gets three tries.
    assert imported.seconds < 0.2 or any(import_package().seconds < 0.2 for _ in range(2))


def test_running_the_layers_needs_no_triton():
    code = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    raise SystemExit("loaded too early")
sys.modules["triton"] = None  # any import of it now fails
import torch
from kfde_layers import CFE, SFE, CSFE, MFDF
for layer in (CFE, SFE, CSFE, MFDF):
    layer(8)(torch.randn(2, 8, 5, 5, requires_grad=True)).sum().backward()
print("ran")
"""
    assert run(code).strip() == "ran"


def test_the_proof_can_fail():
    with pytest.raises(subprocess.CalledProcessError):
        run('import sys\nsys.modules["triton"] = None\nimport triton')
