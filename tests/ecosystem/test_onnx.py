"""ONNX Runtime gives the numbers of the reference, for other batches and sizes than at the export."""

import pytest
import torch

from tests.support.agreement import relative_error
from tests.support.cases import (
    AUTO_OF_FUSED,
    DYNAMIC,
    EXPORTED,
    NOT_EXPORTED,
    OPTIONS,
    TABLE,
    TOLERANCE,
    each_case,
    input_of_case,
    module_and_reference,
)

OPSET = 18

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cell(TABLE, "ONNX Runtime, dynamic batch and size"),
    pytest.mark.usefixtures("exporter"),
]


@pytest.fixture
def exporter():
    """Skip the test without the library that PyTorch's exporter uses."""
    pytest.importorskip("onnxscript", reason="ONNX Script is not installed")


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
@each_case({name: case for name, case in EXPORTED.items() if name not in AUTO_OF_FUSED})
def test_the_numbers_of_the_reference(case, tmp_path):
    onnx = pytest.importorskip("onnx", reason="ONNX is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    module, reference = module_and_reference(case)
    export(module, case.shapes[0], tmp_path / "model.onnx")
    written = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert {(entry.domain, entry.version) for entry in written.opset_import} == {("", OPSET)}
    assert not written.functions
    assert {node.domain for node in written.graph.node} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in case.shapes:
        x = input_of_case(reference, shape)
        (y,) = session.run(["y"], {"x": x.numpy()})
        assert relative_error(y, reference(x.double()).numpy()) < TOLERANCE


@each_case({name: OPTIONS[name] for name in NOT_EXPORTED})
def test_a_layer_that_runs_its_operator_says_why_it_is_not_exported(case, tmp_path):
    with pytest.raises(torch.onnx.OnnxExporterError) as refusal:
        export(case.make().eval(), case.shapes[0], tmp_path / "model.onnx")
    assert "an exporter needs operations that other software has" in str(refusal.value)
