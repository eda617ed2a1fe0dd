"""The code of each of two processes: train every network on its half of the batch."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kfde_layers import CFE, CSFE, MFDF
from kfde_layers.testing import random_tensor
from tests.support.pages import DOCS, python_blocks, run_block
from tests.support.training import INSERTED, MODELS, SMALL, batch, build, train

PAGE = DOCS / "training.md"
PROCESSES = 2
NAMES = [*SMALL, *MODELS, *INSERTED]  # no batch norm in training: a process would take its own half's statistics
ENGINES = ("DDP", "FSDP2")


def names_of_page() -> dict[str, Any]:
    """Run the block of the page on training that wraps a model, and return the names that it defines."""
    (block,) = (block for block in python_blocks(PAGE) if "fully_shard" in block)
    return run_block(block, PAGE)


def wrap(name: str, engine: str) -> nn.Module:
    """Wrap a model as the page does.

    Networks other than the models have no `shard` of the page: with FSDP2, wrap each of their layers by itself.
    """
    model = build(name)
    if engine == "DDP":
        return names_of_page()["replicate"](model)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    if name in MODELS:
        model = names_of_page()["shard"](model, mesh)
    else:
        for parent in list(model.modules()):
            for child in parent.children():
                if isinstance(child, (CFE, CSFE, MFDF)) and not isinstance(parent, CSFE):
                    fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def error_of_sharded(layer: nn.Module, part: nn.Module) -> float:
    """Shard one part of the layer, and return by how much the layer's output differs then."""
    x = random_tensor(2, 8, 4, 4)
    expected = layer(x)
    fully_shard(part, mesh=init_device_mesh("cpu", (PROCESSES,)))
    return float((layer(x) - expected).detach().abs().max())


def work(rank: int, folder: Path) -> None:
    """Write losses and weights of each engine and network to a file of that name."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(minutes=2),
    )
    for engine in ENGINES:
        for name in NAMES:
            model = wrap(name, engine)
            images, labels = (tensor.chunk(PROCESSES)[rank] for tensor in batch(name))
            losses = train(name, model, images, labels)
            dist.all_reduce(losses)
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            if rank == 0:
                torch.save({"losses": losses / PROCESSES, "state": state}, folder / f"{engine} {name}.pt")
    csfe, mfdf, other_mfdf = CSFE(8), MFDF(8), MFDF(8)
    errors = {
        "CSFE": error_of_sharded(csfe, csfe.cfe),
        "MFDF, fc1": error_of_sharded(mfdf, mfdf.fc1),
        "MFDF, a branch": error_of_sharded(other_mfdf, other_mfdf.branches[2]),
    }
    torch.save(errors, folder / f"errors {rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # all is written: as the interpreter ends, a thread of PyTorch may abort the process
