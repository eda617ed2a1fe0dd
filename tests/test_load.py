"""Many steps, threads, processes and copies: nothing grows, and the bits stay the same."""

import itertools
import multiprocessing
import pickle
import resource
import sys
import threading

import numpy as np
import pytest
import torch

from tests.support.inputs import draw
from tests.support.load import make_layers, send_all, step, step_all

pytestmark = pytest.mark.slow

STEPS, WARM_UP = 10_000, 2_000
ALLOWED = 2**20  # bytes; 8,000 steps were seen to add 0.4 MB


def resident() -> int:
    """Return the memory of this process in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_thousands_of_steps_need_no_more_memory():
    # sizes that vary, since something could be kept for each of them
    maps = [draw(2 + size % 3, 6, 1 + size % 5, 1 + size % 7, dtype=torch.float32) for size in range(7)]
    layers = make_layers("CFE", "SFE", "CSFE", "CSFE, cfe_sfe", "MFDF", "MFDF, batch norm")
    work = zip(itertools.cycle(layers.values()), itertools.cycle(maps), strict=False)
    start = 0
    for index, (layer, x) in enumerate(itertools.islice(work, STEPS)):
        if index == WARM_UP:
            start = resident()
        step(layer, x)
    assert resident() - start < ALLOWED


def test_threads_share_the_layers():
    layers = make_layers()
    expected = step_all(layers)
    results: list[list[torch.Tensor]] = []
    threads = [threading.Thread(target=lambda: results.append(step_all(layers))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(all(map(torch.equal, result, expected)) for result in results)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_compute_the_same(protocol):
    layers = make_layers()
    copies = pickle.loads(pickle.dumps(layers, protocol))
    assert all(map(torch.equal, step_all(copies), step_all(layers)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_processes_compute_the_same(method):
    expected = step_all(make_layers())  # so that a forked process inherits a library that has already run
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=send_all, args=(queue,))
    process.start()
    results = queue.get(timeout=300)  # not for ever, if the process dies
    process.join(60)
    assert process.exitcode == 0
    assert len(results) == len(expected)
    for actual, tensor in zip(results, expected, strict=True):
        assert np.array_equal(actual, tensor.numpy())
