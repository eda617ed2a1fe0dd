"""ONNX Runtime gives the numbers of the reference, for other batches and sizes than were exported."""

import pytest
import torch

from tests.ecosystem.layers import (
    DYNAMIC,
    EXPORTED,
    NOT_EXPORTED,
    OPTIONS,
    TABLE,
    TOLERANCE,
    clear_of_the_step,
    each,
    pair,
)
from tests.helpers import relative_error

onnx = pytest.importorskip("onnx", reason="ONNX is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytest.importorskip("onnxscript", reason="ONNX Script, of which PyTorch's exporter is made, is not installed")

OPSET = 18

pytestmark = pytest.mark.cell(TABLE, "ONNX Runtime, dynamic batch and size")


def export(module, shape, path):
    torch.onnx.export(
        module,
        (torch.zeros(shape),),
        path,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=DYNAMIC,
        input_names=["x"],
        output_names=["y"],
        verbose=False,
    )


@torch.no_grad()
@each(EXPORTED)
def test_the_numbers_of_the_reference(case, tmp_path):
    module, reference = pair(case)
    export(module, case.shapes[0], tmp_path / "model.onnx")
    written = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert {(entry.domain, entry.version) for entry in written.opset_import} == {("", OPSET)}
    assert not written.functions
    assert {node.domain for node in written.graph.node} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in case.shapes:
        x = clear_of_the_step(reference, shape)
        (y,) = session.run(["y"], {"x": x.numpy()})
        assert relative_error(y, reference(x.double()).numpy()) < TOLERANCE


@each({name: OPTIONS[name] for name in NOT_EXPORTED})
def test_what_is_made_for_its_operator_says_why_it_is_not_exported(case, tmp_path):
    with pytest.raises(torch.onnx.OnnxExporterError) as refusal:
        export(case.make().eval(), case.shapes[0], tmp_path / "model.onnx")
    assert "an exporter must be shown operations that other software has" in str(refusal.value)
