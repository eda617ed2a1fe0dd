"""One compilation for all batches and sizes gives the right numbers for each of them."""

import pytest
import torch

from tests.ecosystem.layers import (
    OPTIONS,
    SHALLOW,
    TABLE,
    TOLERANCE,
    assert_near,
    clear_of_the_step,
    each,
    in_one_graph,
    pair,
    passes,
)
from tests.helpers import relative_error

pytestmark = pytest.mark.cell(TABLE, "torch.compile, dynamic batch and size")


@each(OPTIONS | {"models": SHALLOW})
def test_forward_and_backward(case):
    module, reference = pair(case)
    compiled = in_one_graph(module, backend="aot_eager", dynamic=True)
    for shape in case.shapes:
        x = clear_of_the_step(reference, shape)
        assert_near(passes(compiled, module, x), passes(reference, reference, x.double()))


@torch.no_grad()
@each({name: OPTIONS[name] for name in ("CFE", "SFE", "CSFE", "MFDF")})
def test_by_inductor(case):
    module, reference = pair(case)
    compiled = in_one_graph(module, dynamic=True)
    for shape in case.shapes:
        x = clear_of_the_step(reference, shape)
        assert relative_error(compiled(x), reference(x.double())) < TOLERANCE
