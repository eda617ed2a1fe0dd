"""How long calls take beside each other: interleaved rounds, and ratios taken within a round."""

import statistics
import timeit
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch
from schema import Spread

Call = Callable[[], object]
Key = tuple[str, str]  # subject and candidate
Result = TypeVar("Result")

CALLS_PER_GRAPH = 10  # so that the launch of a graph weighs nothing beside the kernels in it


class Timed(NamedTuple):
    """What one call took; the lists hold one spread per repetition."""

    method: str
    ms: list[Spread]
    over: dict[str, list[Spread]]


class Clock(Protocol):
    """Times one call; made once per call, which is also the warm-up."""

    method: str

    def seconds(self) -> float: ...


class CpuClock:
    """Repeats the call for about `run_time` seconds."""

    method = "timer"

    def __init__(self, call: Call, run_time: float) -> None:
        self.timer = timeit.Timer(call)
        call()  # what is done once, as the making of a plan
        self.loops = max(1, round(run_time * 3 / self.timer.timeit(3)))

    def seconds(self) -> float:
        return self.timer.timeit(self.loops) / self.loops


class GpuClock:
    """Replays a graph of the call between two events, or launches the call where it cannot be captured."""

    def __init__(self, call: Call, run_time: float, pool: object | None) -> None:
        self.run, self.calls, self.method = call, 1, "cuda events"
        for _ in range(3):
            call()
        if pool is not None:
            try:
                graph, _ = captured(call, CALLS_PER_GRAPH, pool)
                self.run, self.calls, self.method = graph.replay, CALLS_PER_GRAPH, "cuda graph"
            except RuntimeError:  # the call waits for the device, which a graph cannot hold
                torch.cuda.synchronize()
        self.loops = 3
        self.loops = max(1, round(run_time / (self.calls * self.seconds())))

    def seconds(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.loops):
            self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (self.loops * self.calls)


def captured(call: Callable[[], Result], calls: int = 1, pool: object = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of so many calls, and where the last of them leaves its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(calls):
            result = call()
    return graph, result


def clocks(calls: Mapping[Key, Call], device: str, run_time: float, graphs: bool = True) -> dict[Key, Clock]:
    """A clock for each call, warmed up.

    Args:
        calls: By key.
        device: "cpu" or "cuda".
        run_time: Of one visit to one call, in seconds.
        graphs: Whether to capture the calls on a GPU. The graphs share their memory, as only one runs at a time.
    """
    if device == "cpu":
        return {name: CpuClock(call, run_time) for name, call in calls.items()}
    pool = torch.cuda.graph_pool_handle() if graphs else None
    return {name: GpuClock(call, run_time, pool) for name, call in calls.items()}


def interleaved(
    clocks: Mapping[Key, Clock], baselines: Mapping[Key, Mapping[str, Key]], rounds: int, repeats: int
) -> dict[Key, Timed]:
    """Visit each clock once per round, so that a disturbance of the machine meets all alike.

    Args:
        clocks: By key.
        baselines: For each key, what its time is divided by: label and key of a clock.
        rounds: In each repetition.
        repeats: How often the rounds are repeated.
    """
    timed = {name: Timed(clock.method, [], {label: [] for label in baselines[name]}) for name, clock in clocks.items()}
    for _ in range(repeats):
        seconds: dict[Key, list[float]] = {name: [] for name in clocks}
        for _ in range(rounds):
            for name, clock in clocks.items():
                seconds[name].append(clock.seconds())
        for name, (_, ms, over) in timed.items():
            ms.append(spread([1e3 * value for value in seconds[name]]))
            for label, other in baselines[name].items():
                over[label].append(spread([a / b for a, b in zip(seconds[name], seconds[other], strict=True)]))
    return timed


def spread(values: list[float]) -> Spread:
    """Median and quartiles, to five digits."""
    low, middle, high = (float(f"{value:.5g}") for value in statistics.quantiles(values, n=4, method="inclusive"))
    return {"median": middle, "q1": low, "q3": high}
