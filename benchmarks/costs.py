"""The table of what each layer costs: parameters, floating-point operations and measured time."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import table
from benchmarks.schema import Result, Row, best
from kfde_layers import CFE, CSFE, MFDF, SFE

LAYERS: dict[str, Callable[[int, str], nn.Module]] = {
    "CFE": lambda channels, impl: CFE(channels, impl=impl, device="meta"),
    "SFE": lambda channels, impl: SFE(impl=impl),
    "CSFE": lambda channels, impl: CSFE(channels, impl=impl, device="meta"),
    "MFDF": lambda channels, impl: MFDF(channels, impl=impl, device="meta"),
}


def costs_table(results: Sequence[Result]) -> str:
    """Write a line for each layer and shape of the newest result with layers that were measured on CPU."""
    measured = [result for result in results if result["suite"] == "layers" and result["machine"]["device"] == "cpu"]
    if not measured:
        return "No figures of this version are there yet."
    result = measured[-1]
    rows = {(row["subject"], tuple(row["shape"]), row["work"]): row for row in result["rows"] if _is_shown(row)}
    lines = []
    for name, make in LAYERS.items():
        for shape in dict.fromkeys(shape for subject, shape, _ in rows if subject == name):
            x = torch.empty((1, *shape[1:]), device="meta")
            flops = [_flops(make(shape[1], impl), x) for impl in ("reference", "fused")]
            times = [rows.get((name, shape, work)) for work in ("forward", "forward+backward")]
            lines.append(
                (
                    name,
                    f"{shape[1]}",
                    f"{shape[2]} x {shape[3]}",
                    f"{sum(parameter.numel() for parameter in make(shape[1], 'auto').parameters()):,}",
                    *(f"{number / 1e6:.2f}" for number in flops),
                    *("" if row is None else f"{best(row['ms'])['median'] / shape[0]:.3f}" for row in times),
                    *("" if row is None else f"{best(row['over']['copy'])['median']:.1f}" for row in times),
                )
            )
    header = (
        *("layer", "C", "map", "parameters", "MFLOP, reference", "MFLOP, fused"),
        *("ms, forward", "ms, with backward", "/ copy, forward", "/ copy, with backward"),
    )
    machine = result["machine"]
    note = f"{machine['name']}, {machine['threads']} threads, {result['dtype']}, contiguous; times per image."
    return f"{table(header, lines, 1)}\n\n{note}"


def _is_shown(row: Row) -> bool:
    return row["subject"] in LAYERS and row["candidate"] == "auto" and row["layout"] == "contiguous"


def _flops(layer: nn.Module, x: torch.Tensor) -> int:
    """Count the operations of a forward pass for one image, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return counter.get_total_flops()
