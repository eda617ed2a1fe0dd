"""One epoch of training, and prediction, on any number of processes."""

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from breakhis.recipe import set_train

# From random weights, steps on small batches without this bound end in a network that answers the same for any image.
MAX_GRADIENT_NORM = 1.0


def train_one_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    epoch: int,
    names: Sequence[str],
    mixup: Mixup | None = None,
    ema: ModelEmaV3 | None = None,
) -> float:
    """Trains for one epoch.

    Args:
        accelerator: Holds the device, the precision, the other processes and the number of batches per update.
        model: The model, prepared by `accelerator`.
        loader: Batches of (image, target, index), prepared.
        loss_fn: From logits and targets to the mean loss over the batch, in nats.
        optimizer: The optimiser, prepared.
        scheduler: timm's scheduler, which counts updates.
        epoch: From 0.
        names: File name by index, for the report on a loss that is no number.
        mixup: Mixes the images of a batch, and their targets.
        ema: Follows the weights.

    Returns:
        The mean loss over the images of all processes, in nats.

    Raises:
        FloatingPointError: The loss or the gradient is not finite. The message names the step and the batch's files.
    """
    set_train(model)
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)  # sum of the losses, number of images
    update = epoch * updates_per_epoch(accelerator, loader)
    bar = tqdm(loader, desc=f"epoch {epoch + 1}", leave=False, disable=not accelerator.is_main_process)
    for step, (inputs, targets, indices) in enumerate(bar):
        if mixup is not None:
            inputs, targets = mixup(inputs, targets)
        with accelerator.accumulate(model):
            loss = loss_fn(model(inputs), targets)
            value = loss.item()
            where = f"in epoch {epoch + 1}, step {step + 1}: {', '.join(names[index] for index in indices.tolist())}"
            if not math.isfinite(value):
                raise FloatingPointError(f"loss must be finite, got {value} {where}")
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = float(accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM))
                if not math.isfinite(norm) and accelerator.scaler is None:  # which would skip the step itself
                    raise FloatingPointError(f"gradient must be finite, got norm {norm} {where}")
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                update += 1
                scheduler.step_update(update)
                if ema is not None:
                    ema.update(accelerator.unwrap_model(model), update)
        total += torch.tensor([value * len(inputs), len(inputs)], dtype=torch.float64, device=total.device)
    loss_sum, count = accelerator.reduce(total, "sum").tolist()
    return loss_sum / count


def updates_per_epoch(accelerator: Accelerator, loader: DataLoader) -> int:
    """Batches over batches per update, rounded up: the last update of an epoch takes what is left."""
    return -(-len(loader) // accelerator.gradient_accumulation_steps)


@torch.inference_mode()
def predict(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> Tensor:
    """Predicts every image once.

    Args:
        accelerator: Holds the device, the precision and the other processes.
        model: The model, on the device of `accelerator`; prepared by it or not.
        loader: Batches of (image, target, index), prepared, in any order.

    Returns:
        Logits (N, classes) in float32 on the CPU, row i for index i, the same on each process.
    """
    model.eval()
    rows: dict[int, Tensor] = {}
    for inputs, _, indices in loader:
        logits = model(inputs)
        # Processes get equally many images, some of them twice; gathering drops those, and the index keeps the order.
        logits, indices = accelerator.gather_for_metrics((logits.float(), indices))
        rows.update(zip(indices.tolist(), logits.cpu(), strict=True))
    return torch.stack([rows[index] for index in range(len(loader.dataset))])
