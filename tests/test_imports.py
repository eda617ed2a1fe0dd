"""The modules and models that importing the package loads, each in a fresh process."""

import json
import subprocess
import sys

import pytest


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def modules_after(code: str) -> set[str]:
    return set(json.loads(run(f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))").splitlines()[-1]))


def test_importing_loads_neither_triton_nor_any_extra():
    loaded = modules_after("import kfde_layers") - modules_after("import torch, timm, einops")
    roots = {name.split(".")[0] for name in loaded}
    assert roots <= {"kfde_layers"}


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


def test_importing_costs_little_over_timm():
    code = """
import time
import timm
start = time.process_time()
import kfde_layers
print(time.process_time() - start)
"""
    assert min(float(run(code)) for _ in range(3)) < 0.2  # s; timm itself takes several


def test_importing_registers_the_models():
    count = 'print(len(timm.list_models("kfde*")))'
    assert run(f"import timm\n{count}\nimport kfde_layers\n{count}").split() == ["0", "9"]
