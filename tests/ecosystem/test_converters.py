"""The formats of other runtimes: what is converted gives the numbers of the reference on other inputs than its export.

The tests of OpenVINO and ExecuTorch free batch and size, and run on several. LiteRT frees no size, of bare modules
neither: a file has a signature for each shape. Core ML runs on Apple's systems alone: here its models are only made.
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
from tests.support.inputs import draw
from tests.support.pages import DOCS, python_blocks, run_block

PAGE = DOCS / "deployment.md"
TABLE = "Deployment"
# ExecuTorch plans the memory of the largest batch and size that the export allows.
BOUNDED = ({axis: torch.export.Dim.DYNAMIC(max=largest) for axis, largest in ((0, 8), (2, 128), (3, 128))},)
CASES = {name: SHALLOW if case is MODEL else case for name, case in DEFAULTS.items()}
LAYERS = {name: case for name, case in CASES.items() if name != "models"}

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


@pytest.fixture
def to_executorch(tmp_path):
    """A function that lowers a module with free batch and size, and returns one that runs it."""
    exir = pytest.importorskip("executorch.exir", reason="ExecuTorch is not installed")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.runtime import Runtime

    def lower(module, shape):
        program = export(module, shape, BOUNDED)
        lowered = exir.to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        assert any("call_delegate" in str(node.target) for node in lowered.exported_program().graph.nodes)
        (tmp_path / "model.pte").write_bytes(lowered.buffer)
        method = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
        return lambda x: method.execute([x])[0]

    return lower


@quiet
@each_case(CASES)
@pytest.mark.cell(TABLE, "ExecuTorch, XNNPACK")
def test_executorch(case, to_executorch, assert_the_numbers_of_the_reference):
    module, reference = module_and_reference(case)
    assert_the_numbers_of_the_reference(to_executorch(module, case.shapes[0]), reference, case.shapes)


class ProductOfHalves(nn.Module):
    """Multiply the two halves of the channels' means, which one operator returns as a list."""

    def forward(self, x):
        first, second = x.mean(dim=(2, 3)).chunk(2, dim=1)
        return first * second


@quiet
@torch.no_grad()
def test_executorch_fixes_the_batch_where_an_operator_returns_a_list(to_executorch):
    # Its check of types takes the length of the list's first tensor. When this fails, the layers may use `chunk`.
    run, x = to_executorch(ProductOfHalves(), (3, 6, 16, 15)), torch.rand(3, 6, 11, 9)
    assert relative_error(run(x), ProductOfHalves()(x)) < TOLERANCE
    with pytest.raises(RuntimeError, match="0x12"):
        run(x[:2])


@pytest.fixture
def litert_torch():
    return pytest.importorskip("litert_torch", reason="LiteRT Torch is not installed")


def name_of(shape):
    return "x".join(map(str, shape))


@quiet
@each_case(CASES)
@pytest.mark.cell(TABLE, "LiteRT")
def test_litert(case, litert_torch, assert_the_numbers_of_the_reference):
    module, reference = module_and_reference(case)
    converter = litert_torch
    for shape in case.shapes:
        converter = converter.signature(name_of(shape), module, (torch.zeros(shape),))
    model = converter.convert()
    assert_the_numbers_of_the_reference(lambda x: model(x, signature_name=name_of(x.shape)), reference, case.shapes)


class FirstSize(nn.Module):
    """Read a size, as every flattening of a map does."""

    def forward(self, x):
        return x.view(x.shape[0], -1)


@quiet
@pytest.mark.parametrize(
    "make",
    [nn.ReLU, lambda: nn.AdaptiveAvgPool2d(1), FirstSize, *(case.make for case in LAYERS.values())],
    ids=["bare ReLU", "bare mean", "bare size", *LAYERS],
)
def test_litert_frees_no_size(make, litert_torch):
    with pytest.raises((AssertionError, TypeError), match=r"-9223372036854775808|Shapes must be"):
        litert_torch.convert(make().eval(), (torch.zeros(3, 6, 16, 15),), dynamic_shapes=DYNAMIC)


class Variance(nn.Module):
    """Divide by the number of positions, as the layers do."""

    def forward(self, x):
        return x.var(dim=(2, 3))


@quiet
@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [Variance, *(case.make for name, case in LAYERS.items() if name != "MFDF")],
    ids=["bare variance", *(name for name in LAYERS if name != "MFDF")],
)
def test_litert_gives_wrong_numbers_of_a_file_that_is_resized(make, litert_torch, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    module, x = make().eval(), draw(3, 6, 11, 9, dtype=torch.float32)
    litert_torch.convert(module, (torch.zeros(3, 6, 16, 15),)).export(tmp_path / "model.tflite")
    interpreter = Interpreter(str(tmp_path / "model.tflite"))
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.numpy())
    interpreter.invoke()
    resized = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    assert relative_error(resized, module(x).numpy()) > 0.01


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


@quiet
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@each_case(LAYERS)
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
