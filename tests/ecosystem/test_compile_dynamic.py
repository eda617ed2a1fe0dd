"""One compilation for all batches and sizes gives the right numbers for each of them."""

import pytest
import torch

from tests.support.agreement import relative_error
from tests.support.cases import (
    OPTIONS,
    SHALLOW,
    TABLE,
    TOLERANCE,
    assert_within_tolerance,
    compile_whole,
    each_case,
    input_of_case,
    module_and_reference,
    output_and_gradients,
)

pytestmark = pytest.mark.cell(TABLE, "torch.compile, dynamic batch and size")


@each_case(OPTIONS | {"models": SHALLOW})
def test_forward_and_backward(case):
    module, reference = module_and_reference(case)
    compiled = compile_whole(module, backend="aot_eager", dynamic=True)
    for shape in case.shapes:
        x = input_of_case(reference, shape)
        expected = output_and_gradients(reference, reference, x.double())
        assert_within_tolerance(output_and_gradients(compiled, module, x), expected)


@torch.no_grad()
@each_case({name: OPTIONS[name] for name in ("CFE", "SFE", "CSFE", "MFDF")})
def test_by_inductor(case):
    module, reference = module_and_reference(case)
    compiled = compile_whole(module, dynamic=True)
    for shape in case.shapes:
        x = input_of_case(reference, shape)
        assert relative_error(compiled(x), reference(x.double())) < TOLERANCE
