"""Training with Accelerate, in one process and in two, against the plain loop."""

import os
import subprocess
import sys

import pytest
import torch

from tests.support.pages import ROOT
from tests.support.training import MODELS, SMALL, batch, build, exact_training, train

pytestmark = pytest.mark.slow

each_network = pytest.mark.parametrize("name", [*SMALL, *MODELS])
CELL = pytest.mark.cell("Training engines", "Accelerate")


@pytest.fixture
def accelerator():
    """Make an accelerator. Accelerate keeps its settings as long as the process runs, so reset them."""
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    from tests.support.accelerate_worker import make_accelerator

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield make_accelerator()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@each_network
@CELL
def test_one_process_trains_like_the_plain_loop_to_the_last_bit(name, accelerator):
    from tests.support import accelerate_worker

    losses, state = accelerate_worker.train(accelerator, name)
    model = build(name)
    assert torch.equal(losses, train(name, model, *batch(name)))
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    folder = tmp_path_factory.mktemp("accelerate")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--module", "tests.support.accelerate_worker", str(folder)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@each_network
@CELL
def test_two_processes_train_like_the_plain_loop(name, results):
    trained = torch.load(results / f"{name}.pt")
    assert trained["processes"] == 2
    losses, state = exact_training(name)
    torch.testing.assert_close(trained["losses"], losses, rtol=1e-12, atol=0)
    for key, tensor in state.items():
        torch.testing.assert_close(trained["state"][key], tensor, rtol=1e-11, atol=1e-13, msg=key)
