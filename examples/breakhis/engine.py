"""One epoch of training, and prediction, on any number of processes."""

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

# From random weights, steps on small batches without this bound end in a network that answers the same for any image.
MAX_GRADIENT_NORM = 1.0


def train_one_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    epoch: int,
) -> float:
    """Trains for one epoch.

    Args:
        accelerator: Holds the device, the precision and the other processes.
        model: The model, prepared by `accelerator`.
        loader: Batches of (image, target, index), prepared.
        optimizer: The optimiser, prepared.
        scheduler: timm's scheduler, which counts updates.
        epoch: From 0.

    Returns:
        The mean cross-entropy over the images of all processes, in nats.
    """
    model.train()
    total = torch.zeros(2, device=accelerator.device)  # sum of the losses, number of images
    bar = tqdm(loader, desc=f"epoch {epoch + 1}", leave=False, disable=not accelerator.is_main_process)
    for step, (inputs, targets, _) in enumerate(bar):
        loss = F.cross_entropy(model(inputs), targets)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_update(epoch * len(loader) + step + 1)
        total += torch.stack([loss.detach() * len(targets), torch.tensor(len(targets), device=loss.device)])
    loss_sum, count = accelerator.reduce(total, "sum").tolist()
    return loss_sum / count


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
