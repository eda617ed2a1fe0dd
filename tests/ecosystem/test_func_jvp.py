"""Forward-mode derivatives agree with finite differences of the reference, or a module says why it has none.

An operator without a rule for them answers with tangents of zero, and without an error.
"""

import pytest
import torch
from torch.autograd import forward_ad

from tests.ecosystem.layers import CASES, DEFAULTS, OPTIONS, TABLE, clear_of_the_step, each, pair
from tests.helpers import draw, relative_error

FUSED = {name: case for name, case in OPTIONS.items() if "fused" in name}
SEEN_THROUGH = {name: case for name, case in CASES.items() if name not in FUSED}

# Not the model: PyTorch's compiler fails at the layer norms of a bare ConvNeXt.
LAYERS = {name: case for name, case in DEFAULTS.items() if name != "models"}

STEP = 1e-6  # of the difference, in float64: its error is of the order of STEP**2, and of 1e-16 / STEP by rounding
TOLERANCE = 1e-8

pytestmark = pytest.mark.cell(TABLE, "torch.func: jvp")


def jvp(call, x, dx):
    return torch.func.jvp(call, (x,), (dx,))[1]


def dual(call, x, dx):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, dx))).tangent


by_both = pytest.mark.parametrize("mode", [jvp, dual], ids=["jvp", "dual numbers"])


def prepared(case):
    """The module in float64, input and tangent, and the central difference of the reference along them."""
    module, reference = pair(case)
    x, dx = clear_of_the_step(reference, case.shapes[0]).double(), draw(*case.shapes[0], seed=1)
    with torch.no_grad():
        difference = (reference(x + STEP * dx) - reference(x - STEP * dx)) / (2 * STEP)
    return module.double(), x, dx, difference


@by_both
@each(SEEN_THROUGH)
def test_tangents_in_eager_mode(case, mode):
    module, x, dx, difference = prepared(case)
    assert relative_error(mode(module, x, dx), difference) < TOLERANCE


@by_both
@each(LAYERS)
def test_tangents_computed_inside_of_what_is_compiled(case, mode):
    module, x, dx, difference = prepared(case)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, dx: mode(module, x, dx), backend="aot_eager")
    assert relative_error(compiled(x, dx), difference) < TOLERANCE


@by_both
@each(DEFAULTS)
def test_tangents_through_a_compiled_module(case, mode):
    module, x, dx, difference = prepared(case)
    torch.compiler.reset()
    compiled = torch.compile(module.requires_grad_(False), backend="aot_eager")
    assert relative_error(mode(compiled, x, dx), difference) < TOLERANCE


@by_both
@each(FUSED)
def test_fused_refuses(case, mode):
    module, x, dx, _ = prepared(case)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        mode(module, x, dx)


@by_both
@each({"MFDF": OPTIONS["MFDF, fused"], "CSFE": OPTIONS["CSFE, fused"]})
def test_fused_refuses_inside_of_what_is_compiled(case, mode):
    module, x, dx, _ = prepared(case)
    torch.compiler.reset()
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        torch.compile(lambda x, dx: mode(module, x, dx), backend="aot_eager")(x, dx)
