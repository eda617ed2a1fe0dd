from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from benchmarks import timing


class FakeClock:
    """A clock with given times."""

    method = "timer"

    def __init__(self, seconds):
        self.values = iter(seconds)

    def seconds(self):
        return next(self.values)


def test_ratios_are_taken_within_a_round():
    layer, copy = ("CSFE", "auto"), ("floor", "copy")
    # The machine becomes three times slower in each round: the times are useless, the ratio is 2 in each round.
    clocks = {layer: FakeClock([2, 6, 18, 4, 4, 4]), copy: FakeClock([1, 3, 9, 1, 1, 1])}
    timed = timing.interleaved(clocks, {layer: {"copy": copy}, copy: {}}, rounds=3, repeats=2)
    assert timed[layer].method == "timer"
    assert timed[layer].ms[0] == {"median": 6000, "q1": 4000, "q3": 12000}
    assert timed[layer].over == {"copy": [dict.fromkeys(("median", "q1", "q3"), ratio) for ratio in (2, 4)]}
    assert timed[copy].over == {}


def test_rounds_are_interleaved():
    visits = []
    keys = [("a", ""), ("b", "")]

    class Recorder(FakeClock):
        def __init__(self, key):
            self.key = key

        def seconds(self):
            visits.append(self.key)
            return 1.0

    timing.interleaved({key: Recorder(key) for key in keys}, {key: {} for key in keys}, rounds=2, repeats=1)
    assert visits == keys * 2


def test_the_clock_on_cpu_repeats_a_short_call():
    calls = []
    clock = timing.clocks({("a", ""): lambda: calls.append(1)}, "cpu", run_time=0.001)["a", ""]
    calls.clear()
    assert 0 < clock.seconds() < 1e-4
    assert len(calls) > 10


def test_a_spread_has_median_and_quartiles():
    assert timing.spread([5, 1, 4, 2, 3]) == {"median": 3, "q1": 2, "q3": 4}
    assert timing.spread([1 / 3] * 3)["median"] == pytest.approx(1 / 3, rel=1e-4)


class FakeCuda:
    """A GPU on which every replay and every launch takes 1 ms."""

    def __init__(self, capturing=True):
        self.capturing, self.clock, self.launched = capturing, 0.0, 0
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda stream: None)
        self.stream = lambda stream: nullcontext()
        self.graph_pool_handle = object
        self.synchronize = lambda: None
        self.Event = lambda enable_timing: FakeEvent(self)
        self.CUDAGraph = lambda: SimpleNamespace(replay=self.work)

    def work(self):
        self.clock += 1
        self.launched += 1

    @contextmanager
    def graph(self, graph, pool):
        before = self.clock
        yield
        self.clock = before
        if not self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = self.cuda.clock

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.mark.parametrize(
    ("capturing", "graphs", "method", "ms"),
    [(True, True, "cuda graph", 0.1), (False, True, "cuda events", 1), (True, False, "cuda events", 1)],
)
def test_the_clock_on_gpu_replays_a_graph_of_ten_calls_or_launches(monkeypatch, capturing, graphs, method, ms):
    cuda = FakeCuda(capturing)
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    clock = timing.clocks({("a", ""): cuda.work}, "cuda", run_time=0.02, graphs=graphs)["a", ""]
    assert clock.method == method
    cuda.launched = 0
    assert clock.seconds() == pytest.approx(ms / 1e3)
    assert cuda.launched == 20
