"""A package made by AOTInductor, loaded back, gives the numbers of the reference for other batches and sizes."""

import pytest
import torch

from tests.support.agreement import relative_error
from tests.support.cases import (
    DEFAULTS,
    DYNAMIC,
    MODEL,
    SHALLOW,
    TABLE,
    TOLERANCE,
    each_case,
    input_of_case,
    module_and_reference,
)

LAYERS = {name: case for name, case in DEFAULTS.items() if case is not MODEL}

pytestmark = pytest.mark.cell(TABLE, "AOTInductor package")


def check(case, device, path):
    module, reference = module_and_reference(case)
    program = torch.export.export(
        module.to(device), (torch.zeros(case.shapes[0], device=device),), dynamic_shapes=DYNAMIC
    )
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    loaded = torch._inductor.aoti_load_package(str(path))
    for shape in case.shapes:
        x = input_of_case(reference, shape)
        assert relative_error(loaded(x.to(device)).cpu(), reference(x.double())) < TOLERANCE


@torch.no_grad()
@each_case(LAYERS | {"models": SHALLOW})
def test_the_numbers_of_the_reference(case, tmp_path):
    check(case, "cpu", tmp_path / "package.pt2")


@torch.no_grad()
@pytest.mark.gpu
@each_case(DEFAULTS)
def test_the_numbers_of_the_reference_on_cuda(case, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(case, "cuda", tmp_path / "package.pt2")
