"""A module compiled into one graph gives the numbers of its reference, forward and backward; sizes are fixed."""

import pytest
import torch
from packaging.version import Version
from torch._dynamo.backends.registry import lookup_backend

from tests.support.agreement import relative_error
from tests.support.cases import (
    DEFAULTS,
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

pytestmark = [pytest.mark.slow, pytest.mark.cell(TABLE, "torch.compile, fullgraph")]


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"),
    reason="PyTorch 2.8 compiles the backward pass of CFE to C++ that writes past the end of a buffer and aborts",
)
@each_case({name: OPTIONS[name] for name in ("CFE", "SFE", "CSFE", "MFDF")} | {"models": SHALLOW})
def test_by_inductor(case):
    module, reference = module_and_reference(case)
    compiled, x = compile_whole(module), input_of_case(reference, case.shapes[0])
    if case is not SHALLOW:  # whose inference Inductor compiles for a package, in another test
        with torch.no_grad():
            assert relative_error(compiled(x), reference(x.double())) < TOLERANCE
    actual = output_and_gradients(compiled, module, x)
    assert_within_tolerance(actual, output_and_gradients(reference, reference, x.double()))


@pytest.mark.gpu
@each_case(DEFAULTS)
def test_by_inductor_around_the_kernels_for_cuda(case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    operators = set()

    def backend(graph, inputs):
        operators.update(str(node.target) for node in graph.graph.nodes if "kfde" in str(node.target))
        return lookup_backend("inductor")(graph, inputs)

    module, reference = module_and_reference(case)
    x = input_of_case(reference, case.shapes[0])
    module.cuda()
    compiled = compile_whole(module, backend=backend)
    with torch.no_grad():
        assert relative_error(compiled(x.cuda()).cpu(), reference(x.double())) < TOLERANCE
    actual = output_and_gradients(compiled, module, x.cuda())
    actual = {name: tensor.cpu() for name, tensor in actual.items()}
    assert_within_tolerance(actual, output_and_gradients(reference, reference, x.double()))
    assert operators  # "auto" takes the fused operator, which the compiler leaves as it is
