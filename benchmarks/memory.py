"""How much memory a call takes: its peak, and what it keeps for its backward pass."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler's notices would stand between the rows


def peak_bytes(call: Callable[[], Iterable[Tensor]], device: str) -> int:
    """The most that `call` holds at once, beyond what stood before it and what it returns.

    On CPU this counts what PyTorch's allocator hands out; the scratch space of a library that allocates its own is
    not seen.
    """
    call()  # caches and first-time initialisations are not the call's own
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
    """What `forward` keeps for its backward pass: the bytes of the distinct storages, parameters not counted."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())  # with its graph, what a node keeps of its own result would never be freed
        return saved[-1]

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # held until the count is done: with the graph its storages would go, and be reused
    owned = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    total = _distinct(tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in owned)
    del result
    return total


def _distinct(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _allocations(profiler: profile) -> list[int]:
    """Bytes taken (positive) and given back (negative), in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]


def _highest(changes: list[int]) -> int:
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest
