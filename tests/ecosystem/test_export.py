"""An exported program takes other batches and sizes than at its export: read back from a file, and in ONNX Runtime.

One file for both, so that each case is exported once.
"""

import functools

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
REFUSAL = "an exporter needs operations that other software has"

pytestmark = pytest.mark.slow
program_cell = pytest.mark.cell(TABLE, "torch.export, dynamic batch and size")
onnx_cell = pytest.mark.cell(TABLE, "ONNX Runtime, dynamic batch and size")


@functools.cache
def export(case):
    """Return the program of a case, and the case's reference."""
    module, reference = module_and_reference(case)
    with torch.no_grad():
        return torch.export.export(module, (torch.zeros(case.shapes[0]),), dynamic_shapes=DYNAMIC), reference


@torch.no_grad()
@each_case(EXPORTED)
@program_cell
def test_a_program_from_a_file_gives_the_numbers_of_the_reference(case, tmp_path):
    program, reference = export(case)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    operators = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "kfde" in name]  # it runs where this package is not
    for shape in case.shapes:
        x = input_of_case(reference, shape)
        assert relative_error(loaded.module()(x), reference(x.double())) < TOLERANCE


@pytest.mark.parametrize(("fused", "auto"), AUTO_OF_FUSED.items(), ids=AUTO_OF_FUSED.keys())
@program_cell
def test_fused_is_the_same_program_as_auto(fused, auto):
    programs = [export(OPTIONS[name])[0] for name in (fused, auto)]
    assert str(programs[0].graph) == str(programs[1].graph)


@each_case({name: OPTIONS[name] for name in NOT_EXPORTED})
@program_cell
def test_a_layer_that_runs_its_operator_says_why_it_is_not_exported(case):
    with pytest.raises(NotImplementedError, match=REFUSAL):
        torch.export.export(case.make().eval(), (torch.zeros(case.shapes[0]),), dynamic_shapes=DYNAMIC)


@pytest.fixture
def onnx():
    """The library; skip the test without it, or without the one that PyTorch's exporter uses."""
    pytest.importorskip("onnxscript", reason="ONNX Script is not installed")
    return pytest.importorskip("onnx", reason="ONNX is not installed")


def export_to_onnx(model, path, arguments=(), **options):
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(model, arguments, path, dynamo=True, opset_version=OPSET, verbose=False, **names, **options)


@torch.no_grad()
@each_case({name: case for name, case in EXPORTED.items() if name not in AUTO_OF_FUSED})
@onnx_cell
def test_onnx_runtime_gives_the_numbers_of_the_reference(case, tmp_path, onnx):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    program, reference = export(case)
    export_to_onnx(program, tmp_path / "model.onnx")
    written = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert {(entry.domain, entry.version) for entry in written.opset_import} == {("", OPSET)}
    assert not written.functions
    assert {node.domain for node in written.graph.node} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in case.shapes:
        x = input_of_case(reference, shape)
        (y,) = session.run(["y"], {"x": x.numpy()})
        assert relative_error(y, reference(x.double()).numpy()) < TOLERANCE


@each_case({name: OPTIONS[name] for name in ("CSFE", "MFDF")})
@onnx_cell
def test_a_module_becomes_the_same_onnx_file_as_its_program(case, tmp_path, onnx):
    module, arguments = case.make().eval(), (torch.zeros(case.shapes[0]),)
    export_to_onnx(export(case)[0], tmp_path / "program.onnx")
    export_to_onnx(module, tmp_path / "module.onnx", arguments, dynamic_shapes=DYNAMIC)
    graphs = [onnx.load(tmp_path / f"{name}.onnx").graph for name in ("program", "module")]
    assert [node.op_type for node in graphs[0].node] == [node.op_type for node in graphs[1].node]


@each_case({name: OPTIONS[name] for name in NOT_EXPORTED})
@onnx_cell
@pytest.mark.usefixtures("onnx")
def test_a_layer_that_runs_its_operator_says_why_it_is_no_onnx_file(case, tmp_path):
    arguments = (torch.zeros(case.shapes[0]),)
    with pytest.raises(torch.onnx.OnnxExporterError) as refusal:
        export_to_onnx(case.make().eval(), tmp_path / "model.onnx", arguments, dynamic_shapes=DYNAMIC)
    assert REFUSAL in str(refusal.value)
