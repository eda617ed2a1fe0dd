"""A package made by AOTInductor, loaded back, gives the numbers of the reference for other batches and sizes."""

import pytest
import torch
from torch import nn

from tests.support.agreement import relative_error
from tests.support.cases import (
    DEFAULTS,
    DYNAMIC,
    MODEL,
    SHALLOW,
    TABLE,
    TOLERANCE,
    input_of_case,
    module_and_reference,
)

CASES = {name: SHALLOW if case is MODEL else case for name, case in DEFAULTS.items()}

pytestmark = [pytest.mark.slow, pytest.mark.cell(TABLE, "AOTInductor package")]


class SideBySide(nn.Module):
    """Run each module on an input of its own."""

    def __init__(self, modules):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, inputs):
        return [part(x) for part, x in zip(self.parts, inputs, strict=True)]


def package(cases, device, path):
    """Return the loaded package of all cases, and the reference of each.

    One package, since each takes many seconds to compile. The inputs have sizes of their own, so that no part of the
    code serves two modules.
    """
    modules, references = zip(*map(module_and_reference, cases.values()), strict=True)
    inputs = [torch.zeros(case.shapes[0], device=device) for case in cases.values()]
    with torch.no_grad():
        whole = SideBySide(modules).to(device)
        program = torch.export.export(whole, (inputs,), dynamic_shapes=(list(DYNAMIC) * len(cases),))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path)), dict(zip(cases, references, strict=True))


@torch.no_grad()
def check(packaged, name, cases, device):
    """Compare one module, on each of its shapes, while the others get shapes of theirs."""
    loaded, references = packaged
    for index in range(3):
        inputs = [input_of_case(references[other], case.shapes[index]) for other, case in cases.items()]
        outputs = loaded([x.to(device) for x in inputs])
        position = list(cases).index(name)
        expected = references[name](inputs[position].double())
        assert relative_error(outputs[position].cpu(), expected) < TOLERANCE


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    return package(CASES, "cpu", tmp_path_factory.mktemp("aot") / "package.pt2")


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_the_reference(name, packaged):
    check(packaged, name, CASES, "cpu")


@pytest.fixture(scope="module")
def packaged_for_cuda(tmp_path_factory):
    return package(DEFAULTS, "cuda", tmp_path_factory.mktemp("aot") / "package.pt2")


@pytest.mark.gpu
@pytest.mark.parametrize("name", DEFAULTS)
def test_the_numbers_of_the_reference_on_cuda(name, packaged_for_cuda, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(packaged_for_cuda, name, DEFAULTS, "cuda")
