"""The ONNX files of both exporters: tools infer every shape in them, and their operators are common ones."""

import re

import pytest
import torch
from torch import nn

from tests.support.agreement import relative_error
from tests.support.cases import (
    DEFAULTS,
    DYNAMIC,
    MODEL,
    SHALLOW,
    TABLE,
    TOLERANCE,
    each_case,
    input_of_case,
    module_and_reference,
)

OPSET = 18
CASES = {name: SHALLOW if case is MODEL else case for name, case in DEFAULTS.items()}

# Operators of the domain ai.onnx that TensorRT supports, after docs/operators.md of onnx-tensorrt for TensorRT 10.0.
COMMON = re.findall(
    r"\w+",
    """
    Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv
    ConvTranspose Cos CumSum DepthToSpace Div Einsum Elu Equal Erf Exp Expand Flatten Floor Gather
    GatherElements GatherND Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization
    HardSigmoid HardSwish Identity InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log
    LogSoftmax MatMul Max MaxPool Mean Min Mod Mul Neg Not Or PRelu Pad Pow Range Reciprocal ReduceL1 ReduceL2
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round Selu Shape
    Sigmoid Sign Sin Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu
    Unsqueeze Where Xor
    """,
)

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.slow,
    # The older exporter announces its end, and traces through Python's numbers.
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.fixture
def onnx():
    """The library; skip the test without it, or without the one that PyTorch's exporter uses."""
    pytest.importorskip("onnxscript", reason="ONNX Script is not installed")
    return pytest.importorskip("onnx", reason="ONNX is not installed")


def export(module, shape, path, *, dynamo, dynamic):
    options = {"opset_version": OPSET, "input_names": ["x"], "output_names": ["y"]}
    if dynamo:
        options |= {"dynamic_shapes": DYNAMIC if dynamic else None, "verbose": False}
    elif dynamic:
        options["dynamic_axes"] = {"x": {0: "n", 2: "h", 3: "w"}}
    torch.onnx.export(module, (torch.zeros(shape),), path, dynamo=dynamo, **options)


def uncommon(model):
    """Return the operators of a file that are not on the list, each with its domain."""
    return {(node.domain, node.op_type) for node in model.graph.node if node.domain or node.op_type not in COMMON}


def without_shape(model):
    """Return the names of the results in a file of which no shape is written."""
    written = {value.name for value in (*model.graph.value_info, *model.graph.output) if value.type.tensor_type.shape}
    return {name for node in model.graph.node for name in node.output if name not in written}


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
@each_case(CASES)
@pytest.mark.cell(TABLE, "Preparation for quantization in ONNX Runtime")
def test_onnx_runtime_prepares_a_file_of_common_operators(case, dynamo, dynamic, tmp_path, onnx):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    from onnxruntime.quantization.shape_inference import quant_pre_process

    module, reference = module_and_reference(case)
    export(module, case.shapes[0], tmp_path / "model.onnx", dynamo=dynamo, dynamic=dynamic)
    quant_pre_process(tmp_path / "model.onnx", tmp_path / "prepared.onnx")
    prepared = onnx.load(tmp_path / "prepared.onnx")
    assert not uncommon(onnx.load(tmp_path / "model.onnx"))
    assert not uncommon(prepared)
    assert not without_shape(prepared)
    session = onnxruntime.InferenceSession(tmp_path / "prepared.onnx", providers=["CPUExecutionProvider"])
    for shape in case.shapes if dynamic else case.shapes[:1]:
        x = input_of_case(reference, shape)
        (y,) = session.run(["y"], {"x": x.numpy()})
        assert relative_error(y, reference(x.double()).numpy()) < TOLERANCE


class Draw(nn.Module):
    """Draw ones and zeros, by an operator that TensorRT does not have."""

    def forward(self, x):
        return torch.bernoulli(x)


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
def test_an_operator_that_is_not_common_is_seen(dynamo, tmp_path, onnx):
    export(Draw().eval(), (2, 3, 5, 7), tmp_path / "model.onnx", dynamo=dynamo, dynamic=False)
    assert ("", "Bernoulli") in uncommon(onnx.load(tmp_path / "model.onnx"))


def test_a_result_without_a_shape_is_seen(tmp_path, onnx):
    export(CASES["CFE"].make(), (2, 6, 5, 7), tmp_path / "model.onnx", dynamo=False, dynamic=True)
    model = onnx.load(tmp_path / "model.onnx")
    assert not without_shape(onnx.shape_inference.infer_shapes(model)) - without_shape(model)
    del model.graph.value_info[:]
    assert without_shape(model)
