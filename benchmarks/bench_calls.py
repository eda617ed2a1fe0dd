"""Measure what a call of a layer costs on a map of one position, where there is almost nothing to compute.

    python -m benchmarks.bench_calls --output calls.json

Prints times and writes the measurements as JSON. benchmarks/README.md describes the method.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Problems
from benchmarks.memory import peak_bytes
from benchmarks.schema import Row
from benchmarks.timing import Key, clocks, interleaved
from kfde_layers import CFE, CSFE, MFDF, SFE, functional
from kfde_layers.fused.csfe import cpu
from kfde_layers.fused.csfe.operator import fused as fused_gates
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.testing import random_tensor

SHAPE = (1, 2, 1, 1)


def gates(
    layer: CFE | SFE | CSFE, operation: Callable[..., Tensor], options: CsfeOptions, x: Tensor
) -> dict[str, Callable[[], Any]]:
    """List the calls of CFE, SFE or CSFE, from the inside to the outside, and that of the operator."""
    parameters: list[Tensor] = [parameter.detach() for parameter in layer.parameters()]
    given = [*parameters, 1] if parameters else []
    weight, bias = parameters or (None, None)
    return {
        "steps": lambda: cpu.forward(x, weight, bias, options),
        "chosen": lambda: fused_gates(x, weight, bias, options),
        "checked": lambda: operation(x, *given),
        "layer": lambda: layer(x),
        "operator": lambda: torch.ops.kfde.csfe_fused(x, weight, bias, *options),
    }


def branches(layer: MFDF, x: Tensor) -> dict[str, Callable[[], Any]]:
    """List the calls of MFDF in the same way."""
    weights = [branch.weight.detach() for branch in layer.branches]
    biases = [branch.bias.detach() for branch in layer.branches]
    fc = [parameter.detach() for fc in (layer.fc1, layer.fc2) for parameter in fc.parameters()]
    return {"checked": lambda: functional.mfdf(x, weights, biases, *fc), "layer": lambda: layer(x)}


def without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the call in inference mode."""

    def inference() -> Any:
        with torch.inference_mode():
            return call()

    return inference


def main() -> None:
    """Run the command."""
    args = common.parser("bench_calls", __doc__).parse_args()
    settings = common.start(args, compiled=False)
    x = random_tensor(*SHAPE, seed=settings.seed)
    layers = {"CFE": CFE(2, 1), "SFE": SFE(), "CSFE": CSFE(2, 1), "MFDF": MFDF(2)}
    calls_of = {
        "CFE": gates(layers["CFE"], functional.cfe, CsfeOptions(), x),
        "SFE": gates(layers["SFE"], functional.sfe, CsfeOptions(with_sfe=True), x),
        "CSFE": gates(layers["CSFE"], functional.csfe, CsfeOptions(with_sfe=True), x),
        "MFDF": branches(layers["MFDF"], x),
    }
    calls: dict[Key, Callable[[], Any]] = {}
    recorded = x.clone().requires_grad_()
    for name, layer in layers.items():
        calls |= {(name, title): without_gradients(call) for title, call in calls_of[name].items()}
        calls[name, "recorded"] = lambda layer=layer: layer(recorded)
    peaks = {key: peak_bytes(call, settings.device) for key, call in calls.items()}
    timed = interleaved(
        clocks(calls, settings.device, settings.run_time), {key: {} for key in calls}, settings.rounds, settings.repeats
    )
    rows: list[Row] = list(common.rows(timed, peaks, {}, x, "contiguous", "forward"))
    common.show(rows)
    common.finish("calls", args, settings, rows, Problems())


if __name__ == "__main__":
    main()
