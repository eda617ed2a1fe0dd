"""Training from the first epoch to the last, with a state on disk from which a killed run goes on."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from breakhis.checkpoints import build_model, eval_transform, save_model, train_transform
from breakhis.engine import predict, train_one_epoch, updates_per_epoch
from breakhis.images import open_rgb
from breakhis.metrics import balanced_accuracy, image_accuracy
from breakhis.recipe import Loss, freeze_backbone, make_mixup, make_optimizer, make_scheduler
from breakhis.records import ImageDataset, mix_seeds
from breakhis.splits import Split
from breakhis.state import load_state, save_state

logger = logging.getLogger(__name__)

STATE = "state.pt"


def fit(
    args: argparse.Namespace, accelerator: Accelerator, split: Split, classes: Sequence[str]
) -> tuple[list[dict[str, float]], int]:
    """Trains, and writes `last` after each epoch and `best` after each epoch that is the best so far on validation.

    Every epoch starts from a seed of its own, so that weights, optimiser and average are all the state there is: a run
    that goes on from the state of its last whole epoch ends as if it had never been killed.

    Args:
        args: A run's flags.
        accelerator: Holds the device, the precision and the other processes.
        split: What to train on, and to choose the checkpoint on.
        classes: Class names in the order of the outputs.

    Returns:
        A row of losses and validation scores for each epoch, and the number of the best epoch, from 1.

    Raises:
        FloatingPointError: The loss is not finite.
        ValueError: There are too few training images for the batch.
    """
    set_seed(args.seed)
    model, model_args = build_model(args, len(classes))
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":  # the only device that it exists for
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.freeze_backbone:
        freeze_backbone(model)
    transform = train_transform(args, model, open_rgb(split.train[0].path))
    train_data = ImageDataset(split.train, args.task, classes, transform, args.seed)
    val_data = ImageDataset(split.val, args.task, classes, eval_transform(model))
    whole = len(train_data) >= args.batch_size  # then the odd images of an epoch wait for the next
    if args.mixup or args.cutmix:
        _check_mixable(args, accelerator, whole, len(train_data))
    order = torch.Generator()
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    train_loader = accelerator.prepare(
        DataLoader(train_data, shuffle=True, generator=order, drop_last=whole, **loading)
    )
    val_loader = accelerator.prepare(DataLoader(val_data, **loading))
    loss_fn = Loss(train_data.targets, len(classes), args.class_weights, args.smoothing).to(accelerator.device)
    mixup = make_mixup(args, len(classes))
    optimizer = make_optimizer(args, model)
    scheduler = make_scheduler(args, optimizer, updates_per_epoch(accelerator, train_loader))
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    ema = ModelEmaV3(bare, args.ema_decay, use_warmup=True) if args.ema_decay else None
    kept: nn.Module = bare if ema is None else ema.module
    state = _State(args.output_dir / STATE, accelerator, bare, optimizer, ema)
    history, best_epoch, best_rank = state.restore()

    for epoch in range(len(history), args.epochs):
        train_data.epoch = epoch
        order.manual_seed(mix_seeds(args.seed, epoch))
        set_seed(mix_seeds(args.seed, epoch), device_specific=True)  # drop path and mixup, in each process its own
        row: dict[str, float] = {"epoch": epoch + 1}
        row["train_loss"] = train_one_epoch(
            accelerator,
            model,
            train_loader,
            loss_fn,
            optimizer,
            scheduler,
            epoch,
            [record.path.name for record in split.train],
            mixup,
            ema,
        )
        for buffer in kept.buffers():  # of batch norm, else each process would validate another model than is saved
            buffer.copy_(broadcast(buffer))
        if split.val:
            logits, targets = predict(accelerator, kept, val_loader), torch.tensor(val_data.targets)
            row["val_loss"] = F.cross_entropy(logits, targets).item()
            row["val_balanced_accuracy"] = balanced_accuracy(targets, logits)
            row["val_image_accuracy"] = image_accuracy(targets, logits)
            rank = [row["val_balanced_accuracy"], -row["val_loss"]]
            is_best = best_rank is None or rank > best_rank
            if is_best:
                best_epoch, best_rank = epoch + 1, rank
        else:
            is_best, best_epoch = epoch + 1 == args.epochs, args.epochs
        history.append(row)
        logger.info(", ".join(f"{key} {value:.4g}" for key, value in row.items()))
        if accelerator.is_main_process:
            # The models first: killed in between, the run repeats the epoch, and writes the same ones again.
            for name in ("last", "best") if is_best else ("last",):
                save_model(kept, args.output_dir / name, classes, model_args)
            state.save(history, best_epoch, best_rank)
    accelerator.wait_for_everyone()
    return history, best_epoch


def _check_mixable(args: argparse.Namespace, accelerator: Accelerator, whole: bool, count: int) -> None:
    """Mixup pairs the images of a batch, in each process for itself."""
    share = args.batch_size / accelerator.num_processes
    if not whole or share % 2:
        raise ValueError(
            f"batch_size must be at most the number of training images, {count}, and even in each of the "
            f"{accelerator.num_processes} processes with mixup or cutmix, got {args.batch_size}"
        )


class _State:
    """Everything that an epoch changes, to and from one file."""

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: ModelEmaV3 | None,
    ) -> None:
        self.path, self.parts = path, {"model": model, "optimizer": optimizer}
        if ema is not None:
            self.parts["ema"] = ema
        if accelerator.scaler is not None:  # of fp16
            self.parts["scaler"] = accelerator.scaler

    def save(self, history: list[dict[str, float]], best_epoch: int, best_rank: list[float] | None) -> None:
        """Writes the state as it is after an epoch."""
        parts: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        save_state(self.path, parts | {"history": history, "best_epoch": best_epoch, "best_rank": best_rank})

    def restore(self) -> tuple[list[dict[str, float]], int, list[float] | None]:
        """Reads it back; an empty history, no best epoch and no rank where there is no state."""
        state = load_state(self.path)
        if state is None:
            return [], 0, None
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        logger.info("resumed behind epoch %d", len(state["history"]))
        return state["history"], state["best_epoch"], state["best_rank"]
