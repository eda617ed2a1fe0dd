"""The formats of other runtimes: what is converted gives the numbers of the reference on other inputs than its export.

The tests of OpenVINO free batch and size, and run on several. ExecuTorch and LiteRT get one shape, and run on another
input of that shape. Core ML runs on Apple's systems alone: here its models are only made.
"""

import gc
import logging
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tests.support.agreement import relative_error
from tests.support.cases import (
    DEFAULTS,
    DYNAMIC,
    MODEL,
    SHALLOW,
    TOLERANCE,
    each_case,
    input_of_case,
    module_and_reference,
)
from tests.support.pages import DOCS, python_blocks, run_block

PAGE = DOCS / "deployment.md"
TABLE = "Deployment"
CASES = {name: SHALLOW if case is MODEL else case for name, case in DEFAULTS.items()}

pytestmark = [pytest.mark.deployment, pytest.mark.slow]
quiet_exports = (
    pytest.mark.filterwarnings("ignore:.*is an Enum subclass and is now natively supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(read|open)_(binary|text) is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This API is experimental and subject to change:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Function _TORCH_OPS_REGISTRY:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Output, .* of the source model, has been renamed:UserWarning"),
)


def quiet(test):
    for mark in quiet_exports:
        test = mark(test)
    return test


def export(module, shape, dynamic_shapes=None):
    with torch.no_grad():
        return torch.export.export(module, (torch.zeros(shape),), dynamic_shapes=dynamic_shapes)


@pytest.fixture
def assert_the_numbers_of_the_reference(request, record_property):
    """A function that compares what was converted with the reference, and notes the error."""

    @torch.no_grad()
    def compare(run, reference, shapes):
        inputs = [input_of_case(reference, shape) for shape in shapes]
        errors = [relative_error(torch.as_tensor(np.asarray(run(x))), reference(x.double())) for x in inputs]
        record_property("note", f"error of {request.node.callspec.id.split('-')[0]} {max(errors):.0e}")
        assert max(errors) < TOLERANCE

    return compare


@pytest.mark.parametrize(
    ("case", "source"),
    [*((case, "program") for case in CASES.values()), (SHALLOW, "ONNX")],
    ids=[*CASES, "models, by ONNX"],
)
@pytest.mark.cell(TABLE, "OpenVINO")
def test_openvino(case, source, tmp_path, assert_the_numbers_of_the_reference):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    module, reference = module_and_reference(case)
    model = export(module, case.shapes[0], DYNAMIC)
    if source == "ONNX":
        pytest.importorskip("onnxscript", reason="ONNX Script is not installed")
        torch.onnx.export(model, (), tmp_path / "model.onnx", dynamo=True, opset_version=18, verbose=False)
        model = tmp_path / "model.onnx"
    compiled = openvino.compile_model(openvino.convert_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_the_numbers_of_the_reference(lambda x: compiled(x.numpy())[0], reference, case.shapes)


@quiet
@each_case(CASES)
@pytest.mark.cell(TABLE, "ExecuTorch, XNNPACK")
def test_executorch(case, assert_the_numbers_of_the_reference):
    exir = pytest.importorskip("executorch.exir", reason="ExecuTorch is not installed")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.runtime import Runtime

    module, reference = module_and_reference(case)
    program = export(module, case.shapes[0])
    lowered = exir.to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    assert any("call_delegate" in str(node.target) for node in lowered.exported_program().graph.nodes)
    method = Runtime.get().load_program(lowered.buffer).load_method("forward")
    assert_the_numbers_of_the_reference(lambda x: method.execute([x])[0], reference, case.shapes[:1])


@quiet
@each_case(CASES)
@pytest.mark.cell(TABLE, "LiteRT")
def test_litert(case, assert_the_numbers_of_the_reference):
    litert_torch = pytest.importorskip("litert_torch", reason="LiteRT Torch is not installed")
    module, reference = module_and_reference(case)
    model = litert_torch.convert(module, (torch.zeros(case.shapes[0]),))
    assert_the_numbers_of_the_reference(model, reference, case.shapes[:1])


@pytest.fixture
def to_core_ml(caplog, tmp_path):
    """A function that makes a Core ML model of a module, from an exported program or from a trace."""
    caplog.set_level(logging.CRITICAL)
    coremltools = pytest.importorskip("coremltools", reason="coremltools is not installed")

    def convert(module, shape, *, decompositions=None, traced=False):
        options = {
            "minimum_deployment_target": coremltools.target.iOS17,
            "compute_precision": coremltools.precision.FLOAT32,  # as the layers compute
            "package_dir": str(tmp_path / "model.mlpackage"),
        }
        if traced:
            with torch.no_grad():
                program = torch.jit.trace(module, torch.zeros(shape), check_trace=False)
            options["inputs"] = [coremltools.TensorType(name="x", shape=shape)]
        else:
            program = export(module, shape).run_decompositions(decompositions or {})
        return coremltools.convert(program, **options)

    yield convert
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # coremltools leaves its temporary folder to the collector
        gc.collect()


def shape_of_output(model):
    """Return the shape that a Core ML model declares for its output."""
    (output,) = model.get_spec().description.output
    return tuple(output.type.multiArrayType.shape)


@quiet
@each_case(CASES)
@pytest.mark.cell(TABLE, "CoreML, conversion")
def test_core_ml_converts_a_program(case, to_core_ml):
    module, reference = module_and_reference(case)
    model = to_core_ml(module, case.shapes[0])
    assert shape_of_output(model) == tuple(reference(torch.zeros(case.shapes[0]).double()).shape)


class FirstSize(nn.Module):
    """Read a size, as every flattening of a map does."""

    def forward(self, x):
        return x.view(x.shape[0], -1)


@quiet
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@each_case({name: case for name, case in CASES.items() if name != "models"})
def test_core_ml_converts_a_trace_if_it_converts_any_that_reads_a_size(case, to_core_ml):
    def failure(module):
        try:
            to_core_ml(module.eval(), case.shapes[0], traced=True)
        except Exception as error:
            return str(error)
        return None

    # With NumPy 2.4, coremltools 9 fails at every size: it makes an int of an array of one element.
    assert failure(case.make()) in (None, failure(FirstSize()))
    assert failure(FirstSize()) in (None, "only 0-dimensional arrays can be converted to Python scalars")


@quiet
@pytest.mark.parametrize("name", ["convnextv2_atto", "kfde_convnextv2_atto"])
def test_core_ml_needs_a_decomposition_of_what_timm_uses_in_a_block(name, to_core_ml):
    model = timm.create_model(name, depths=(1, 1, 1, 1), num_classes=8).eval()
    with pytest.raises(NotImplementedError, match="Unsupported fx node addcmul"):  # of ConvNeXt-V2's response norm
        to_core_ml(model, (2, 3, 64, 64))

    def addcmul(x, a, b, value=1):
        return x + value * a * b

    converted = to_core_ml(model, (2, 3, 64, 64), decompositions={torch.ops.aten.addcmul.default: addcmul})
    assert shape_of_output(converted) == (2, 8)


@pytest.fixture(scope="module")
def page():
    """The names that the code blocks of the page define."""
    torch.manual_seed(0)  # of another network or input, rounding may carry a gate across its threshold
    names = {"__name__": "deployment"}
    for block in python_blocks(PAGE):
        run_block(block, PAGE, names)
    return names


@quiet
@torch.no_grad()
@pytest.mark.usefixtures("to_core_ml")
@pytest.mark.parametrize(
    ("library", "function"),
    [
        ("onnxscript", "to_onnx"),
        ("openvino", "to_openvino"),
        ("executorch", "to_executorch"),
        ("litert_torch", "to_litert"),
        ("coremltools", "to_core_ml"),
        ("torchao", "to_pt2e"),
    ],
)
def test_the_functions_of_the_page_run(library, function, page, tmp_path):
    pytest.importorskip(library, reason=f"{library} is not installed")
    x, expected = page["x"], page["network"](page["x"])
    arguments = {"to_onnx": [tmp_path / "model.onnx"], "to_pt2e": [[x]]}.get(function, [])
    made = page[function](*arguments)
    if function == "to_openvino":
        made = lambda x, run=made: run(x.numpy())[0]  # noqa: E731
    if callable(made):
        error = relative_error(torch.as_tensor(np.asarray(made(x))), expected)
        assert error < (0.2 if function == "to_pt2e" else TOLERANCE)
    else:
        assert made or (tmp_path / "model.onnx").stat().st_size > 1e5
