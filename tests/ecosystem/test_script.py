"""TorchScript, written to a file and read back, gives the numbers of the reference, forward and backward."""

import pytest
import torch

from tests.support.cases import (
    CASES,
    TABLE,
    assert_within_tolerance,
    each_case,
    input_of_case,
    module_and_reference,
    output_and_gradients,
)

pytestmark = [pytest.mark.slow, pytest.mark.cell(TABLE, "TorchScript")]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@each_case(CASES)
def test_the_numbers_of_the_reference(case, training, tmp_path):
    module, reference = module_and_reference(case)
    torch.jit.save(torch.jit.script(module), tmp_path / "script.pt")
    loaded = torch.jit.load(tmp_path / "script.pt").train(training)
    for shape in case.shapes:
        x = input_of_case(reference.eval(), shape)
        expected = output_and_gradients(reference, reference.train(training), x.double())
        assert_within_tolerance(output_and_gradients(loaded, loaded, x), expected)
