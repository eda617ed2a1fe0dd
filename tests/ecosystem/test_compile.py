"""A module compiled into one graph gives the numbers of its reference, forward and backward."""

import pytest
import torch
from packaging.version import Version
from torch._dynamo.backends.registry import lookup_backend

from tests.ecosystem.layers import (
    DEFAULTS,
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

pytestmark = pytest.mark.cell(TABLE, "torch.compile, fullgraph")


def check(compiled, module, reference, x):
    """Inference, and then a step of training with what it leaves in the buffers."""
    with torch.no_grad():
        assert relative_error(compiled(x), reference(x.double())) < TOLERANCE
    module.train(), reference.train()
    assert_near(passes(compiled, module, x), passes(reference, reference, x.double()))
    for buffer, expected in zip(module.buffers(), reference.buffers(), strict=True):
        assert relative_error(buffer, expected) < TOLERANCE


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"),
    reason="the C++ that PyTorch 2.8 makes of the backward pass of CFE writes past a buffer of its own, and aborts",
)
@each({name: OPTIONS[name] for name in ("CFE", "SFE", "CSFE", "MFDF")} | {"models": SHALLOW})
def test_by_inductor(case):
    module, reference = pair(case)
    check(in_one_graph(module), module, reference, clear_of_the_step(reference, case.shapes[0]))


@each(OPTIONS)
def test_every_option_as_one_graph(case):
    module, reference = pair(case)
    x = clear_of_the_step(reference, case.shapes[0]).contiguous(memory_format=torch.channels_last)
    check(in_one_graph(module, backend="aot_eager"), module, reference, x)


@pytest.mark.gpu
@each(DEFAULTS)
def test_by_inductor_around_the_kernels_for_cuda(case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    operators = set()

    def backend(graph, inputs):
        operators.update(str(node.target) for node in graph.graph.nodes if "kfde" in str(node.target))
        return lookup_backend("inductor")(graph, inputs)

    module, reference = pair(case)
    x = clear_of_the_step(reference, case.shapes[0])
    module.cuda()
    compiled = in_one_graph(module, backend=backend)
    with torch.no_grad():
        assert relative_error(compiled(x.cuda()).cpu(), reference(x.double())) < TOLERANCE
    found = passes(compiled, module, x.cuda())
    assert_near({name: tensor.cpu() for name, tensor in found.items()}, passes(reference, reference, x.double()))
    assert operators  # "auto" takes the fused form, which the compiler leaves as it is
