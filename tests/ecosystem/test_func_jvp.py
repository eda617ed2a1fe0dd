"""Forward-mode derivatives agree with finite differences of the reference, or a module says why it has none.

An operator without a rule for them would return tangents of zero, without an error.
"""

import pytest
import torch
from torch.autograd import forward_ad

from tests.support.agreement import relative_error
from tests.support.cases import CASES, DEFAULTS, OPTIONS, TABLE, each_case, input_of_case, module_and_reference
from tests.support.inputs import draw

FUSED = {name: case for name, case in OPTIONS.items() if "fused" in name}
DIFFERENTIATED = {name: case for name, case in CASES.items() if name not in FUSED}

# Not the model: PyTorch's compiler fails at the layer norms of a ConvNeXt.
LAYERS = {name: case for name, case in DEFAULTS.items() if name != "models"}

STEP = 1e-6  # of the central difference, in float64: its error is about STEP**2, plus 1e-16 / STEP by rounding
TOLERANCE = 1e-8

pytestmark = [pytest.mark.slow, pytest.mark.cell(TABLE, "torch.func: jvp")]


def jvp(call, x, dx):
    return torch.func.jvp(call, (x,), (dx,))[1]


def dual(call, x, dx):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, dx))).tangent


each_mode = pytest.mark.parametrize("mode", [jvp, dual], ids=["jvp", "dual numbers"])


def with_central_difference(case):
    """Return the module in float64, input and tangent, and the central difference of the reference."""
    module, reference = module_and_reference(case)
    x, dx = input_of_case(reference, case.shapes[0]).double(), draw(*case.shapes[0], seed=1)
    with torch.no_grad():
        difference = (reference(x + STEP * dx) - reference(x - STEP * dx)) / (2 * STEP)
    return module.double(), x, dx, difference


@each_mode
@each_case(DIFFERENTIATED)
def test_tangents_in_eager_mode(case, mode):
    module, x, dx, difference = with_central_difference(case)
    assert relative_error(mode(module, x, dx), difference) < TOLERANCE


@each_mode
@each_case(LAYERS)
def test_tangents_computed_inside_a_compiled_function(case, mode):
    module, x, dx, difference = with_central_difference(case)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, dx: mode(module, x, dx), backend="aot_eager")
    assert relative_error(compiled(x, dx), difference) < TOLERANCE


@each_mode
@each_case(DEFAULTS)
def test_tangents_through_a_compiled_module(case, mode):
    module, x, dx, difference = with_central_difference(case)
    torch.compiler.reset()
    compiled = torch.compile(module.requires_grad_(False), backend="aot_eager")
    assert relative_error(mode(compiled, x, dx), difference) < TOLERANCE


@each_mode
@each_case(FUSED)
def test_fused_refuses(case, mode):
    module, x, dx, _ = with_central_difference(case)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        mode(module, x, dx)


@each_mode
@each_case({"MFDF": OPTIONS["MFDF, fused"], "CSFE": OPTIONS["CSFE, fused"]})
def test_fused_refuses_inside_a_compiled_function(case, mode):
    module, x, dx, _ = with_central_difference(case)
    torch.compiler.reset()
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        torch.compile(lambda x, dx: mode(module, x, dx), backend="aot_eager")(x, dx)
