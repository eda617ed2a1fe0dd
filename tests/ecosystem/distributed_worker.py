"""What each of two processes does: train every network on its half of the batch."""

import re
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
from tests.ecosystem.training import INSERTED, MODELS, SMALL, batch, build, train

PAGE = Path(__file__).parents[2] / "docs/training.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROCESSES = 2
NAMES = [*SMALL, *MODELS, *INSERTED]  # no batch norm in training: a process would take its own half's statistics
ENGINES = ("DDP", "FSDP2")


def shown() -> dict[str, Any]:
    """What the page on training says of wrapping a model."""
    (block,) = (block for block in BLOCK.findall(PAGE.read_text()) if "fully_shard" in block)
    names: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    return names


def wrapped(name: str, engine: str) -> nn.Module:
    """A model as the page shows it; of any other network, with FSDP2 each layer by itself."""
    model = build(name)
    if engine == "DDP":
        return shown()["replicate"](model)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    if name in MODELS:
        model = shown()["shard"](model, mesh)
    else:
        for parent in list(model.modules()):
            for child in parent.children():
                if isinstance(child, (CFE, CSFE, MFDF)) and not isinstance(parent, CSFE):
                    fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def refusal(layer: nn.Module, part: nn.Module) -> str:
    """What comes of sharding a part of a layer, which the layer reads without calling it."""
    fully_shard(part, mesh=init_device_mesh("cpu", (PROCESSES,)))
    try:
        return str(layer(torch.zeros(2, 8, 4, 4)))
    except RuntimeError as error:
        return str(error)


def work(rank: int, folder: Path) -> None:
    """Writes losses and weights of each engine and network to a file of that name."""
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
            model = wrapped(name, engine)
            images, labels = (tensor.chunk(PROCESSES)[rank] for tensor in batch(name))
            losses = train(name, model, images, labels)
            dist.all_reduce(losses)
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            if rank == 0:
                torch.save({"losses": losses / PROCESSES, "state": state}, folder / f"{engine} {name}.pt")
    csfe, mfdf = CSFE(8), MFDF(8)
    torch.save({"CSFE": refusal(csfe, csfe.cfe), "MFDF": refusal(mfdf, mfdf.fc1)}, folder / f"refusals {rank}.pt")
    dist.destroy_process_group()
