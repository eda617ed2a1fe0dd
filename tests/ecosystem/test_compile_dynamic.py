"""Every option becomes one graph for all batches and sizes, which gives the right numbers for each of them.

Inductor compiles the default layers: graphs of fixed sizes in test_compile.py, of free ones in test_aot.py.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.support.agreement import relative_error
from tests.support.cases import (
    AUTO_OF_FUSED,
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

pytestmark = pytest.mark.slow

DYNAMIC_CELL = pytest.mark.cell(TABLE, "torch.compile, dynamic batch and size")


class Step(NamedTuple):
    """A forward and a backward pass of a compiled module."""

    actual: dict[str, Tensor]
    """Output and gradients."""
    expected: dict[str, Tensor]
    """Output and gradients of the reference."""
    compilations: int
    """Number of compilations up to then."""


@pytest.fixture(scope="module")
def steps(request):
    """Compile a case once, and run it on each of its shapes."""
    case = request.param
    module, reference = module_and_reference(case)
    inputs = [input_of_case(reference, shape).contiguous(memory_format=torch.channels_last) for shape in case.shapes]
    module.train(), reference.train()
    compiled = compile_whole(module, backend="aot_eager", dynamic=True)
    counters["stats"].clear()
    steps = []
    for x in inputs:
        actual = output_and_gradients(compiled, module, x)
        expected = output_and_gradients(reference, reference, x.double())
        steps.append(Step(actual, expected, counters["stats"]["unique_graphs"]))
    for buffer, expected in zip(module.buffers(), reference.buffers(), strict=True):
        assert relative_error(buffer, expected) < TOLERANCE
    return steps


CASES = {name: case for name, case in (OPTIONS | {"models": SHALLOW}).items() if name not in AUTO_OF_FUSED}
each_compiled_case = pytest.mark.parametrize("steps", CASES.values(), ids=CASES.keys(), indirect=True)


@each_compiled_case
@DYNAMIC_CELL
def test_forward_and_backward(steps):
    for step in steps:
        assert_within_tolerance(step.actual, step.expected)


@each_compiled_case
@pytest.mark.cell(TABLE, "no recompile on a second batch size")
def test_it_is_compiled_once(steps):
    assert [step.compilations for step in steps] == [1, 1, 1]


@pytest.mark.parametrize(("fused", "auto"), AUTO_OF_FUSED.items(), ids=AUTO_OF_FUSED.keys())
@DYNAMIC_CELL
def test_fused_is_the_same_graph_as_auto(fused, auto):
    graphs = []
    for name in (fused, auto):
        module, _ = module_and_reference(OPTIONS[name])
        compiled = compile_whole(module, backend=lambda graph, inputs: graphs.append(graph) or graph, dynamic=True)
        compiled(torch.zeros(OPTIONS[name].shapes[0]))
    assert len(graphs) == 2
    assert graphs[0].code == graphs[1].code


@DYNAMIC_CELL
@each_case({name: case for name, case in OPTIONS.items() if list(case.make().buffers())})
def test_norms_in_evaluation(case):
    module, reference = module_and_reference(case)
    compiled = compile_whole(module, backend="aot_eager", dynamic=True)
    for shape in case.shapes:
        x = input_of_case(reference, shape)
        with torch.no_grad():
            assert relative_error(compiled(x), reference(x.double())) < TOLERANCE
    actual = output_and_gradients(compiled, module, x)
    assert_within_tolerance(actual, output_and_gradients(reference, reference, x.double()))
