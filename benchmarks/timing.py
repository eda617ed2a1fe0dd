"""Time calls in interleaved rounds, and take their ratios within a round."""

import statistics
import timeit
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch

from benchmarks.schema import Spread

Call = Callable[[], object]
Key = tuple[str, str]  # subject and candidate
Result = TypeVar("Result")

CALLS_PER_GRAPH = 10  # enough that launching a graph takes no time next to the kernels in it


class Timed(NamedTuple):
    """Times of one call. The lists hold one spread per repetition."""

    method: str
    """How it was timed, see `Row` of the schema."""
    ms: list[Spread]
    """Time, in ms."""
    over: dict[str, list[Spread]]
    """Time over that of a baseline, by the baseline's label."""


class Clock(Protocol):
    """Time one call. There is one clock per call, and making it warms the call up."""

    method: str

    def seconds(self) -> float:
        """Time the call once, in s."""
        ...


class CpuClock:
    """Time the call by repeating it for about `run_time` s."""

    method = "timer"

    def __init__(self, call: Call, run_time: float) -> None:
        self.timer = timeit.Timer(call)
        call()  # does what is done once only, such as the choice of a convolution algorithm
        self.loops = max(1, round(run_time * 3 / self.timer.timeit(3)))

    def seconds(self) -> float:
        return self.timer.timeit(self.loops) / self.loops


class GpuClock:
    """Time a CUDA graph of the call, or the call itself if it cannot be captured, between two CUDA events."""

    def __init__(self, call: Call, run_time: float, pool: object | None) -> None:
        self.run, self.calls, self.method = call, 1, "cuda events"
        for _ in range(3):
            call()
        if pool is not None:
            try:
                graph, _ = captured(call, CALLS_PER_GRAPH, pool)
                self.run, self.calls, self.method = graph.replay, CALLS_PER_GRAPH, "cuda graph"
            except RuntimeError:  # the call waits for the device, which a graph cannot contain
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
    """Capture a CUDA graph of `calls` calls, and return it with the result that the last call writes."""
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
    """Make a clock for each call, warmed up.

    Args:
        calls: The calls by key.
        device: "cpu" or "cuda".
        run_time: Time of one visit to one call, in s.
        graphs: Whether to capture the calls on a GPU. The graphs share their memory, because only one runs at a time.
    """
    if device == "cpu":
        return {name: CpuClock(call, run_time) for name, call in calls.items()}
    pool = torch.cuda.graph_pool_handle() if graphs else None
    return {name: GpuClock(call, run_time, pool) for name, call in calls.items()}


def interleaved(
    clocks: Mapping[Key, Clock], baselines: Mapping[Key, Mapping[str, Key]], rounds: int, repeats: int
) -> dict[Key, Timed]:
    """Read each clock once per round, so that a disturbance of the machine affects all calls alike.

    Args:
        clocks: The clocks by key.
        baselines: For each key, label and key of the clocks that its time is divided by.
        rounds: Number of rounds in each repetition.
        repeats: Number of repetitions.
    """
    timed = {name: Timed(clock.method, [], {label: [] for label in baselines[name]}) for name, clock in clocks.items()}
    for _ in range(repeats):
        seconds: dict[Key, list[float]] = {name: [] for name in clocks}
        for _ in range(rounds):
            for name, clock in clocks.items():
                seconds[name].append(clock.seconds())
        for name, (_, ms, over) in timed.items():
            ms.append(spread([1e3 * value for value in seconds[name]]))
            for label, baseline in baselines[name].items():
                ratios = [time / base for time, base in zip(seconds[name], seconds[baseline], strict=True)]
                over[label].append(spread(ratios))
    return timed


def spread(values: list[float]) -> Spread:
    """Return median and quartiles, to five digits."""
    low, middle, high = (float(f"{value:.5g}") for value in statistics.quantiles(values, n=4, method="inclusive"))
    return {"median": middle, "q1": low, "q3": high}
