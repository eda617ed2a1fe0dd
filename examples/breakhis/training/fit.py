"""Train for all epochs, with a state on disk from which a killed run goes on."""

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, set_seed
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from breakhis.data.images import open_rgb
from breakhis.data.records import ImageDataset, mix_seeds
from breakhis.data.splits import Split
from breakhis.results.metrics import balanced_accuracy, image_accuracy
from breakhis.training.checkpoints import (
    build_model,
    eval_transform,
    hash_checkpoint,
    save_model,
    train_transform,
)
from breakhis.training.engine import Trainer, predict, train_one_epoch, updates_per_epoch
from breakhis.training.options import differences
from breakhis.training.recipe import Loss, freeze_backbone, make_mixup, make_optimizer, make_scheduler
from breakhis.training.state import STATE, load_state, save_state
from breakhis.training.time_left import TimeLeft
from breakhis.training.trained_on import describe_training

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What the epochs have led to so far."""

    history: list[dict[str, float]] = field(default_factory=list)
    """A row of losses and validation scores for each epoch."""
    best_epoch: int = 0
    """Number of the best epoch, from 1; 0 before there is one."""
    best_rank: list[float] | None = None
    """The validation scores of the best epoch, by which epochs are compared."""
    best_files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file in `best`, by name."""


def fit(
    args: argparse.Namespace,
    accelerator: Accelerator,
    split: Split,
    classes: Sequence[str],
    identity: dict[str, Any],
    time_left: TimeLeft,
) -> Progress:
    """Train, and write `last` after each epoch and `best` after each epoch that is the best so far on validation.

    Every epoch starts from a seed of its own, so that weights, optimiser and average are the whole state: a run that
    goes on from the state of its last complete epoch ends as if it had never been killed.

    Args:
        args: Flags of the run.
        accelerator: Holds the device, the precision and the other processes.
        split: The images to train on, and those to choose the checkpoint on.
        classes: Class names in the order of the outputs.
        identity: Everything that the weights depend on. A state on disk with another identity is refused.
        time_left: Learns how long each epoch takes.

    Returns:
        The progress after the last epoch, the same on each process.

    Raises:
        FloatingPointError: The loss, or a score on validation, is not finite.
        ValueError: There are too few training images for the batch, or the state on disk is not of this run.
    """
    set_seed(args.seed)
    model, built = _make_model(args, accelerator, len(classes))
    built["trained_on"] = describe_training([*split.train, *split.val], args.magnification)
    data = _make_data(args, accelerator, split, classes, model)
    trainer = _make_trainer(args, accelerator, model, data, len(classes))
    unwrapped = accelerator.unwrap_model(trainer.model)
    scored_model: nn.Module = unwrapped if trainer.ema is None else trainer.ema.module
    state = _State(args.output_dir / STATE, identity, accelerator, unwrapped, trainer)
    progress = state.restore()

    for epoch in range(len(progress.history), args.epochs):
        start = time.monotonic()
        data.train.epoch = epoch
        data.order.manual_seed(mix_seeds(args.seed, epoch))
        set_seed(mix_seeds(args.seed, epoch), device_specific=True)  # other drop path and mixup in each process
        names = [record.path.name for record in split.train]
        row: dict[str, float] = {"epoch": epoch + 1}
        row["train_loss"] = train_one_epoch(accelerator, trainer, data.train_loader, epoch, names)
        for buffer in scored_model.buffers():  # else each process would validate its own batch norm statistics
            buffer.copy_(broadcast(buffer))
        if split.val:
            scores, rank = _validate(accelerator, scored_model, data, epoch)
            row |= scores
            is_best = progress.best_rank is None or rank > progress.best_rank
            if is_best:
                progress.best_epoch, progress.best_rank = epoch + 1, rank
        else:
            is_best, progress.best_epoch = epoch + 1 == args.epochs, args.epochs
        progress.history.append(row)
        logger.info(", ".join(f"{key} {value:.4g}" for key, value in row.items()))
        if accelerator.is_main_process:
            # The models first: a run that is killed before the state is written repeats the epoch and the models.
            for name in ("last", "best") if is_best else ("last",):
                save_model(scored_model, args.output_dir / name, classes, built)
            if is_best:
                progress.best_files = hash_checkpoint(args.output_dir / "best")
            state.save(progress)
        time_left.add_epoch(args, epoch + 1, time.monotonic() - start)
        if time_left.timed == 1:
            logger.info("at the speed of this epoch %s", time_left)
    (progress,) = broadcast_object_list([progress])
    return progress


class _Data(NamedTuple):
    """The images as they are loaded."""

    train: ImageDataset
    """Training images; its `epoch` chooses the random transforms."""
    val: ImageDataset
    """Validation images."""
    order: torch.Generator
    """Shuffles the training images."""
    train_loader: DataLoader
    """Batches of the training images, prepared."""
    val_loader: DataLoader
    """Batches of the validation images, prepared."""


def _make_model(
    args: argparse.Namespace, accelerator: Accelerator, num_classes: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model that is trained; see `build_model`."""
    model, built = build_model(args, num_classes)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":  # synchronised batch norm needs CUDA
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.freeze_backbone:
        freeze_backbone(model)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)  # PyTorch's convolutions then return such maps
    return model, built


def _make_data(
    args: argparse.Namespace, accelerator: Accelerator, split: Split, classes: Sequence[str], model: nn.Module
) -> _Data:
    """Make the data sets and their loaders, and refuse a batch that mixup cannot mix."""
    transform = train_transform(args, model, open_rgb(split.train[0].path))
    train = ImageDataset(split.train, args.task, classes, transform, args.seed)
    val = ImageDataset(split.val, args.task, classes, eval_transform(model))
    drop_last = len(train) >= args.batch_size  # drop the incomplete last batch of an epoch
    if args.mixup or args.cutmix:
        _check_mixable(args, accelerator, drop_last, len(train))
    order = torch.Generator()
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    train_loader = DataLoader(train, shuffle=True, generator=order, drop_last=drop_last, **loading)
    val_loader = DataLoader(val, **loading)
    return _Data(train, val, order, accelerator.prepare(train_loader), accelerator.prepare(val_loader))


def _make_trainer(
    args: argparse.Namespace, accelerator: Accelerator, model: nn.Module, data: _Data, num_classes: int
) -> Trainer:
    """Make the optimiser and everything else that trains the model."""
    loss_fn = Loss(data.train.targets, num_classes, args.class_weights, args.smoothing).to(accelerator.device)
    mixup = make_mixup(args, num_classes)
    optimizer = make_optimizer(args, model)
    scheduler = make_scheduler(args, optimizer, updates_per_epoch(accelerator, data.train_loader))
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = ModelEmaV3(accelerator.unwrap_model(model), args.ema_decay, use_warmup=True) if args.ema_decay else None
    return Trainer(model, optimizer, scheduler, loss_fn, mixup, ema)


def _validate(
    accelerator: Accelerator, model: nn.Module, data: _Data, epoch: int
) -> tuple[dict[str, float], list[float]]:
    """Score the model on validation; return the scores, and the rank of the epoch, of which the larger is better."""
    logits = predict(accelerator, model, data.val_loader, f"the model after epoch {epoch + 1}")
    targets = torch.tensor(data.val.targets)
    scores = {
        "val_loss": F.cross_entropy(logits, targets).item(),
        "val_balanced_accuracy": balanced_accuracy(targets, logits),
        "val_image_accuracy": image_accuracy(targets, logits),
    }
    return scores, [scores["val_balanced_accuracy"], -scores["val_loss"]]


def _check_mixable(args: argparse.Namespace, accelerator: Accelerator, only_full_batches: bool, count: int) -> None:
    """Refuse a batch whose images cannot be paired: each process mixes pairs of its own images."""
    share = args.batch_size / accelerator.num_processes
    if not only_full_batches or share % 2:
        raise ValueError(
            f"batch_size must be at most the number of training images, {count}, and even in each of the "
            f"{accelerator.num_processes} processes with mixup or cutmix, got {args.batch_size}"
        )


class _State:
    """Everything that an epoch changes, to and from one file."""

    def __init__(
        self, path: Path, identity: dict[str, Any], accelerator: Accelerator, model: nn.Module, trainer: Trainer
    ) -> None:
        self.path, self.identity = path, identity
        self.parts = {"model": model, "optimizer": trainer.optimizer}
        if trainer.ema is not None:
            self.parts["ema"] = trainer.ema
        if accelerator.scaler is not None:  # with fp16
            self.parts["scaler"] = accelerator.scaler

    def save(self, progress: Progress) -> None:
        """Write the state after an epoch."""
        parts: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        save_state(self.path, parts | asdict(progress) | {"identity": self.identity})

    def restore(self) -> Progress:
        """Read the state, if there is one, and return the progress.

        Raises:
            ValueError: The file is damaged, or the state of another run.
        """
        names = [entry.name for entry in fields(Progress)]
        state = load_state(self.path, ["identity", *names, *self.parts])
        if state is None:
            return Progress()
        if changed := differences(state["identity"], self.identity):
            raise ValueError(
                f"--resume must go on with what {self.path} was written with, since each of these changes the weights: "
                f"{'; '.join(changed)}"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        logger.info("resumed after epoch %d", len(state["history"]))
        return Progress(**{name: state[name] for name in names})
