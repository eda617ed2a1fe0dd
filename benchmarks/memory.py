"""Measure the memory of a call: its peak, and the part that forward keeps for backward.

    python -m benchmarks.memory

Prints both for every layer and peer on one shape, in multiples of the input. benchmarks/README.md defines them.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from benchmarks.arguments import command_parser
from benchmarks.calls import forward_and_backward
from benchmarks.candidates import candidates
from benchmarks.report import table
from kfde_layers.testing import random_tensor

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # without it the profiler prints notices between the rows


def peak_bytes(call: Callable[[], Iterable[Tensor]], device: str) -> int:
    """Measure the memory that `call` holds at most, without its results and without the memory held before.

    On CPU this counts PyTorch's allocator; memory that a library allocates by itself is not counted.

    Args:
        call: Returns its results.
        device: "cpu" or "cuda".
    """
    call()  # fills caches and initialises libraries, which is not counted
    if device == "cpu":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            returned = call()
        peak = _highest(_allocations(profiler))
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    return peak - _distinct(returned)


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Measure the memory that `forward` keeps for backward: the bytes of all distinct storages, without parameters."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())  # with its graph, a result saved by its own node would never be freed
        return saved[-1]

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # kept until all is counted: without the graph, storages would be freed and reused
    of_parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    total = _distinct(tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in of_parameters)
    del result
    return total


def _distinct(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages of tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _allocations(profiler: profile) -> list[int]:
    """List the bytes that are allocated (positive) and freed (negative), in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]


def _highest(changes: list[int]) -> int:
    """Return the highest sum of the first changes; 0 if no sum is positive."""
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest


def main() -> None:
    """Run the command."""
    parser = command_parser("memory", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", type=int, nargs=4, default=[8, 96, 56, 56], help="N C H W (default: 8 96 56 56)")
    args = parser.parse_args()
    x = random_tensor(*args.shape, device=args.device)
    lines = []
    for subject, name, module, _ in candidates(x.shape[1], args.device, x.dtype, compiled=False):
        try:
            peak = peak_bytes(forward_and_backward(module, x, torch.ones_like(x)), args.device)
        except (NotImplementedError, torch.OutOfMemoryError):  # it cannot run here
            continue
        saved = saved_bytes(partial(module, x.clone().requires_grad_()), module.parameters())
        lines.append((subject, name, *(f"{size / x.untyped_storage().nbytes():.2f}" for size in (peak, saved))))
    print(table(("layer", "candidate", "peak / input", "saved / input"), lines, 2))


if __name__ == "__main__":
    main()
