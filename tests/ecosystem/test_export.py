"""An exported program, written to a file and read back, takes other batches and sizes than at its export."""

import functools

import pytest
import torch

from tests.support.agreement import relative_error
from tests.support.cases import (
    AUTO_OF_FUSED,
    DYNAMIC,
    EXPORTED,
    NOT_EXPORTED,
    OPTIONS,
    TABLE,
    TOLERANCE,
    each_case,
    input_of_case,
    module_and_reference,
)

pytestmark = [pytest.mark.slow, pytest.mark.cell(TABLE, "torch.export, dynamic batch and size")]


@functools.cache
def export(case):
    """Return the program of a case, and the case's reference."""
    module, reference = module_and_reference(case)
    with torch.no_grad():
        return torch.export.export(module, (torch.zeros(case.shapes[0]),), dynamic_shapes=DYNAMIC), reference


@torch.no_grad()
@each_case(EXPORTED)
def test_the_numbers_of_the_reference(case, tmp_path):
    program, reference = export(case)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    operators = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "kfde" in name]  # it runs where this package is not
    for shape in case.shapes:
        x = input_of_case(reference, shape)
        assert relative_error(loaded.module()(x), reference(x.double())) < TOLERANCE


@pytest.mark.parametrize(("fused", "auto"), AUTO_OF_FUSED.items(), ids=AUTO_OF_FUSED.keys())
def test_fused_is_the_same_program_as_auto(fused, auto):
    programs = [export(OPTIONS[name])[0] for name in (fused, auto)]
    assert str(programs[0].graph) == str(programs[1].graph)


@each_case({name: OPTIONS[name] for name in NOT_EXPORTED})
def test_a_layer_that_runs_its_operator_says_why_it_is_not_exported(case):
    with pytest.raises(NotImplementedError, match="an exporter needs operations that other software has"):
        torch.export.export(case.make().eval(), (torch.zeros(case.shapes[0]),), dynamic_shapes=DYNAMIC)
