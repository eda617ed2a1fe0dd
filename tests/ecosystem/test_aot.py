"""A package made by AOTInductor, loaded back, gives the numbers of the reference for other batches and sizes."""

import pytest
import torch

from tests.ecosystem.layers import DEFAULTS, DYNAMIC, MODEL, SHALLOW, TABLE, TOLERANCE, clear_of_the_step, each, pair
from tests.helpers import relative_error

LAYERS = {name: case for name, case in DEFAULTS.items() if case is not MODEL}

pytestmark = pytest.mark.cell(TABLE, "AOTInductor package")


def check(case, device, path):
    module, reference = pair(case)
    program = torch.export.export(
        module.to(device), (torch.zeros(case.shapes[0], device=device),), dynamic_shapes=DYNAMIC
    )
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    loaded = torch._inductor.aoti_load_package(str(path))
    for shape in case.shapes:
        x = clear_of_the_step(reference, shape)
        assert relative_error(loaded(x.to(device)).cpu(), reference(x.double())) < TOLERANCE


@torch.no_grad()
@each(LAYERS | {"models": SHALLOW})
def test_the_numbers_of_the_reference(case, tmp_path):
    check(case, "cpu", tmp_path / "package.pt2")


@torch.no_grad()
@pytest.mark.gpu
@each(DEFAULTS)
def test_the_numbers_of_the_reference_on_cuda(case, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(case, "cuda", tmp_path / "package.pt2")
