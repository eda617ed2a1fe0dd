"""TorchScript, written to a file and read back, gives the numbers of the reference, forward and backward."""

import pytest
import torch

from tests.ecosystem.layers import CASES, TABLE, assert_near, clear_of_the_step, each, pair, passes

pytestmark = pytest.mark.cell(TABLE, "TorchScript")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@each(CASES)
def test_the_numbers_of_the_reference(case, training, tmp_path):
    module, reference = pair(case)
    torch.jit.save(torch.jit.script(module), tmp_path / "script.pt")
    loaded = torch.jit.load(tmp_path / "script.pt").train(training)
    for shape in case.shapes:
        x = clear_of_the_step(reference.eval(), shape)
        assert_near(passes(loaded, loaded, x), passes(reference, reference.train(training), x.double()))
