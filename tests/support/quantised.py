"""Ways to quantise a module to int8; each returns a function of a batch."""

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

Run = Callable[[Tensor], Tensor]

# Without VNNI, x86 adds pairs of 8-bit products in 16 bits, where they saturate: then even a bare convolution is wrong
# by far more than its rounding. With 7 bits they fit.
SATURATES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and not torch.cpu._is_vnni_supported()

# Of the libraries: parts of PyTorch that move, and what ONNX Runtime's tools call.
quiet = (
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is an Enum subclass and is now natively supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
)


def torchao_weights(module: nn.Module, calibration: Sequence[Tensor], folder: Path) -> Run:
    """Quantise the weights of linear layers."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantised = copy.deepcopy(module)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    return quantised


def torchao_dynamic(module: nn.Module, calibration: Sequence[Tensor], folder: Path) -> Run:
    """Quantise linear layers, with scales of each input."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantised = copy.deepcopy(module)
    quantization.quantize_(quantised, quantization.Int8DynamicActivationInt8WeightConfig())
    return quantised


def quantize_dynamic(module: nn.Module, calibration: Sequence[Tensor], folder: Path) -> Run:
    """Quantise linear layers by PyTorch's older tool."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deprecat.*", UserWarning)
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear}, dtype=torch.qint8)


def pt2e(
    module: nn.Module, calibration: Sequence[Tensor], folder: Path, *, in_float: Sequence[type[nn.Module]] = ()
) -> Run:
    """Quantise convolutions, linear layers and products with scales of the calibration, for x86 and Inductor.

    Parts of the types `in_float` stay as they are.
    """
    x86 = pytest.importorskip(
        "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", reason="torchao has no PT2E quantizers"
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = x86.get_default_x86_inductor_quantization_config(reduce_range=SATURATES)
    quantizer = x86.X86InductorQuantizer().set_global(config)
    for name, part in module.named_modules():
        if isinstance(part, tuple(in_float)):
            quantizer.set_module_name_qconfig(name, None)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(module, (calibration[0],), dynamic_shapes=shapes)
    prepared = prepare_pt2e(program.module(), quantizer)
    for batch in calibration:
        prepared(batch)
    return convert_pt2e(prepared)


def onnx_runtime(
    module: nn.Module,
    calibration: Sequence[Tensor],
    folder: Path,
    *,
    symbolic: bool = False,
    in_float: Sequence[type[nn.Module]] = (),
) -> Run:
    """Quantise every operator of ONNX Runtime's list with scales of the calibration.

    Nodes that come from modules of the types `in_float` stay as they are.
    """
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="ONNX Script is not installed")
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"x": batch.numpy()} for batch in calibration])

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    names = {"input_names": ["x"], "dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},), "external_data": False}
    exported, prepared, quantised = (folder / f"{name}.onnx" for name in ("exported", "prepared", "quantised"))
    torch.onnx.export(module, (calibration[0],), exported, dynamo=True, opset_version=18, verbose=False, **names)
    level = logging.root.level
    try:
        logging.root.setLevel(logging.ERROR)
        quant_pre_process(exported, prepared, skip_symbolic_shape=not symbolic)
        excluded = nodes_of(exported, in_float)
        options = {"per_channel": True, "reduce_range": SATURATES, "nodes_to_exclude": excluded}
        quantize_static(prepared, quantised, Reader(), **options)
    finally:
        logging.root.setLevel(level)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(quantised, settings, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def nodes_of(path: Path, types: Sequence[type[nn.Module]]) -> list[str]:
    """Return the names of the nodes in an ONNX file, not yet prepared, that come from modules of these types."""
    onnx = pytest.importorskip("onnx", reason="ONNX is not installed")
    classes = [f"{kind.__module__}.{kind.__qualname__}'" for kind in types]
    modules = {
        node.name: entry.value
        for node in onnx.load(path).graph.node
        for entry in node.metadata_props
        if entry.key == "pkg.torch.onnx.class_hierarchy"
    }
    return [node for node, names in modules.items() if any(name in names for name in classes)]


METHODS = {
    "int8 weights of torchao": torchao_weights,
    "int8 of torchao, dynamic": torchao_dynamic,
    "quantize_dynamic": quantize_dynamic,
    "PT2E with X86InductorQuantizer": pt2e,
    "ONNX Runtime, static": onnx_runtime,
}
