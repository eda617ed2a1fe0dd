"""Two processes that share a batch train like one process with the whole batch."""

import pytest
import torch
from torch import multiprocessing

from tests.support.distributed_worker import NAMES, PROCESSES, work
from tests.support.training import build, exact_training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Start the processes once for all networks, since that takes longer than the training."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(work, (folder,), nprocs=PROCESSES)
    return folder


def assert_as_in_one_process(results, engine: str, name: str) -> None:
    trained = torch.load(results / f"{engine} {name}.pt")
    losses, state = exact_training(name)
    torch.testing.assert_close(trained["losses"], losses, rtol=1e-12, atol=0)
    assert trained["state"].keys() == state.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(trained["state"][key], tensor, rtol=1e-11, atol=1e-13, msg=key)
    for key, start in build(name).named_parameters():
        assert not torch.equal(trained["state"][key], start), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cell("Training engines", "DDP, two processes")
def test_ddp_trains_like_one_process(name, results):
    assert_as_in_one_process(results, "DDP", name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cell("Training engines", "FSDP2, two processes")
def test_fsdp2_trains_like_one_process(name, results):
    assert_as_in_one_process(results, "FSDP2", name)


@pytest.mark.parametrize("name", ["CSFE", "MFDF, fc1", "MFDF, a branch"])
@pytest.mark.cell("Training engines", "FSDP2, two processes")
def test_fsdp2_shards_one_part_alone(name, results):
    for rank in range(PROCESSES):
        assert torch.load(results / f"errors {rank}.pt")[name] < 1e-6
