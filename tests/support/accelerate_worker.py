"""A training loop with Accelerate. As a script, it is the code of each process of `accelerate launch`."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.support.training import CLASSES, MODELS, SMALL, STEPS, batch, build, make_optimizer

NAMES = [*SMALL, *MODELS]


def make_accelerator() -> Accelerator:
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))


def train(accelerator: Accelerator, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Train a network; return losses and final weights."""
    model = build(name)
    loader = DataLoader(TensorDataset(*batch(name)), batch_size=CLASSES)
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(name, model), loader)
    losses = []
    for _ in range(STEPS):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            losses.append(accelerator.reduce(loss.detach(), "mean"))
    return torch.stack(losses), accelerator.get_state_dict(model)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = make_accelerator()
    for name in NAMES:
        losses, state = train(accelerator, name)
        if accelerator.is_main_process:
            result = {"processes": accelerator.num_processes, "losses": losses, "state": state}
            torch.save(result, folder / f"{name}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
