"""Train for one epoch, and predict, with any number of processes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from breakhis.training.finite import check_scores
from breakhis.training.recipe import set_train

MAX_GRADIENT_NORM = 1.0  # without clipping, training from random weights collapses to a constant prediction


@dataclass
class Trainer:
    """The objects that training changes, and the loss that drives them."""

    model: nn.Module
    """The model, prepared by the accelerator."""
    optimizer: torch.optim.Optimizer
    """The optimiser, prepared by the accelerator."""
    scheduler: Scheduler
    """timm's scheduler, which counts updates."""
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    """From logits and targets to the mean loss over the batch, in nats."""
    mixup: Mixup | None = None
    """Mixes the images of a batch, and their targets."""
    ema: ModelEmaV3 | None = None
    """Averages the weights."""


def train_one_epoch(
    accelerator: Accelerator, trainer: Trainer, loader: DataLoader, epoch: int, names: Sequence[str]
) -> float:
    """Train for one epoch.

    Args:
        accelerator: Holds the device, the precision, the other processes and the number of batches per update.
        trainer: The model and what trains it; changed in place.
        loader: Batches of (image, target, index), prepared by `accelerator`.
        epoch: Number of the epoch, from 0.
        names: File name by index, for the error of a loss that is not finite.

    Returns:
        The mean loss over the images of all processes, in nats.

    Raises:
        FloatingPointError: The loss or the gradient is not finite. The message names the step and the batch's files.
    """
    set_train(trainer.model)
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)  # sum of the losses, number of images
    update = epoch * updates_per_epoch(accelerator, loader)
    # disable=None: a bar on a terminal alone, not in a file or a pipe
    bar = tqdm(loader, desc=f"epoch {epoch + 1}", leave=False, disable=None if accelerator.is_main_process else True)
    for step, (inputs, targets, indices) in enumerate(bar):
        if trainer.mixup is not None:
            inputs, targets = trainer.mixup(inputs, targets)
        where = f"in epoch {epoch + 1}, step {step + 1}: {', '.join(names[index] for index in indices.tolist())}"
        with accelerator.accumulate(trainer.model):
            value = _step(accelerator, trainer, inputs, targets, where)
            if accelerator.sync_gradients:
                update += 1
                trainer.scheduler.step_update(update)
                if trainer.ema is not None:
                    trainer.ema.update(accelerator.unwrap_model(trainer.model), update)
        total += torch.tensor([value * len(inputs), len(inputs)], dtype=torch.float64, device=total.device)
    loss_sum, count = accelerator.reduce(total, "sum").tolist()
    return loss_sum / count


def _step(accelerator: Accelerator, trainer: Trainer, inputs: Tensor, targets: Tensor, where: str) -> float:
    """Run forward, backward and the optimiser on one batch, and return the loss."""
    loss = trainer.loss_fn(trainer.model(inputs), targets)
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"loss must be finite, got {value} {where}")
    accelerator.backward(loss)
    if accelerator.sync_gradients:
        norm = float(accelerator.clip_grad_norm_(trainer.model.parameters(), MAX_GRADIENT_NORM))
        if not math.isfinite(norm) and accelerator.scaler is None:  # a scaler skips the step itself
            raise FloatingPointError(f"gradient must be finite, got norm {norm} {where}")
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return value


def updates_per_epoch(accelerator: Accelerator, loader: DataLoader) -> int:
    """Divide batches by batches per update, rounded up: the last update of an epoch takes the rest."""
    return -(-len(loader) // accelerator.gradient_accumulation_steps)


@torch.inference_mode()
def predict(accelerator: Accelerator, model: nn.Module, loader: DataLoader, checkpoint: Path | str) -> Tensor:
    """Predict every image once.

    Args:
        accelerator: Holds the device, the precision and the other processes.
        model: The model, on the device of `accelerator`; prepared by it or not.
        loader: Batches of (image, target, index) of an `ImageDataset` in any order, prepared by `accelerator`.
        checkpoint: Folder or name of the model, for the error.

    Returns:
        Logits, (N, classes), in float32 on the CPU. Row i belongs to index i. They are the same on each process.

    Raises:
        FloatingPointError: A logit is not finite. The message names the model and the image.
    """
    model.eval()
    rows: dict[int, Tensor] = {}
    for inputs, _, indices in loader:
        logits = model(inputs)
        # All processes get the same number of images, so some images come twice. Gathering drops the second ones.
        logits, indices = accelerator.gather_for_metrics((logits.float(), indices))
        rows.update(zip(indices.tolist(), logits.cpu(), strict=True))
    logits = torch.stack([rows[index] for index in range(len(loader.dataset))])
    check_scores(logits, [record.path for record in loader.dataset.records], checkpoint)
    return logits
