"""How often a module is compiled as batch and size change: not for each of them, although "auto" reads the shape."""

import pytest
import torch

from tests.support.agreement import relative_error
from tests.support.cases import (
    DEFAULTS,
    OPTIONS,
    TABLE,
    TOLERANCE,
    compile_whole,
    each_case,
    input_of_case,
    module_and_reference,
)

pytestmark = [pytest.mark.slow, pytest.mark.cell(TABLE, "no recompile on a second batch size")]


class CountingBackend:
    """A compiler that leaves each graph as it is, and counts the graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def graphs_after_each(case, shapes, *, grad=True, marked=(), memory_format=torch.contiguous_format, **options):
    """Return the number of graphs compiled after each of the shapes, and compare the results."""
    module, reference = module_and_reference(case)
    backend = CountingBackend()
    compiled = compile_whole(module, backend=backend, **options)
    graphs = []
    for shape in shapes:
        x = input_of_case(reference, shape).contiguous(memory_format=memory_format)
        torch._dynamo.mark_dynamic(x, marked)
        with torch.set_grad_enabled(grad):
            assert relative_error(compiled(x), reference(x.double())) < TOLERANCE
        graphs.append(backend.graphs)
    return graphs


@each_case(DEFAULTS)
def test_with_dimensions_marked_it_is_compiled_once(case):
    assert graphs_after_each(case, case.shapes, marked=(0, 2, 3)) == [1, 1, 1]


@each_case(DEFAULTS)
def test_by_default_the_second_batch_size_is_the_last_to_be_compiled(case):
    shapes = [(batch, *case.shapes[0][1:]) for batch in (3, 3, 2, 5, 4)]
    assert graphs_after_each(case, shapes, grad=False) == [1, 1, 2, 2, 2]


@pytest.mark.cell(TABLE, "no recompile on a second batch size", "MFDF")
def test_auto_is_compiled_once_for_each_implementation_that_it_takes():
    """Inference by MFDF on channels_last maps: the compiler takes small ones, the operator large ones."""
    shapes = [(batch, 6, side, side + 1) for side in (4, 11, 15, 16, 19, 24) for batch in (2, 3)]
    graphs = graphs_after_each(OPTIONS["MFDF"], shapes, grad=False, memory_format=torch.channels_last, dynamic=True)
    assert graphs == [1] * 6 + [2] * 6
