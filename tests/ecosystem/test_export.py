"""An exported program, written to a file and read back, takes other batches and sizes than at its export."""

import pytest
import torch

from tests.support.agreement import relative_error
from tests.support.cases import (
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

pytestmark = pytest.mark.cell(TABLE, "torch.export, dynamic batch and size")


@torch.no_grad()
@each_case(EXPORTED)
def test_the_numbers_of_the_reference(case, tmp_path):
    module, reference = module_and_reference(case)
    program = torch.export.export(module, (torch.zeros(case.shapes[0]),), dynamic_shapes=DYNAMIC)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    operators = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "kfde" in name]  # it runs where this package is not
    for shape in case.shapes:
        x = input_of_case(reference, shape)
        assert relative_error(loaded.module()(x), reference(x.double())) < TOLERANCE


@each_case({name: OPTIONS[name] for name in NOT_EXPORTED})
def test_a_layer_that_runs_its_operator_says_why_it_is_not_exported(case):
    with pytest.raises(NotImplementedError, match="an exporter needs operations that other software has"):
        torch.export.export(case.make().eval(), (torch.zeros(case.shapes[0]),), dynamic_shapes=DYNAMIC)
