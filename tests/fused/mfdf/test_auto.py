"""Where "auto" takes the fused MFDF."""

import pytest
import torch

from kfde_layers.ops import mfdf as mfdf_ops
from tests.support.agreement import relative_error
from tests.support.inputs import draw
from tests.support.mfdf import MfdfParameters


@pytest.mark.parametrize(
    ("kernel_sizes", "dilation", "merged"),
    [
        ((1, 3, 5, 7), 1, True),
        ((1, 3, 5, 7), 2, True),
        ((1, 3, 5, 7), (1, 2, 3, 1), True),
        ((3, 3, 3), (1, 2, 6), False),
        ((3, 5), 1, False),
    ],
)
def test_auto_merges_where_that_was_measured_to_be_faster(kernel_sizes, dilation, merged):
    parameters, x = MfdfParameters.random(6, kernel_sizes, 6), draw(2, 6, 11, 13)
    y = parameters(x, dilation, 6, "auto")
    assert torch.equal(y, parameters(x, dilation, 6, "fused")) == merged
    assert torch.equal(y, parameters(x, dilation, 6, "reference")) == (not merged)


def test_exporters_see_the_branches(monkeypatch):
    monkeypatch.setattr(mfdf_ops, "exporting", lambda: True)
    parameters, x = MfdfParameters.random(6, (1, 3, 5, 7), 6), draw(2, 6, 28, 28)
    assert relative_error(parameters(x, 1, 6, "auto"), parameters(x, 1, 6, "reference")) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "memory_format", "grad", "operator"),
    [
        (16, torch.channels_last, False, False),
        (16, torch.channels_last, True, True),
        (17, torch.channels_last, False, True),
        (16, torch.contiguous_format, False, True),
    ],
)
def test_a_compiler_sees_the_branches_where_its_code_is_faster(size, memory_format, grad, operator):
    torch.compiler.reset()
    targets = []

    def backend(module, inputs):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    x = draw(2, 6, size, size, dtype=torch.float32, memory_format=memory_format)
    parameters = MfdfParameters.random(6, (1, 3, 5, 7), 6, dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        y = torch.compile(lambda: parameters(x, 1, 6), fullgraph=True, backend=backend)()
        assert relative_error(y, parameters(x, 1, 6, "reference")) < 1e-5
    assert any("merged_convolution" in target for target in targets) == operator
