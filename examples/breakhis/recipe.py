"""What is trained and how: the pieces that timm and torch make from a run's flags."""

import argparse
from collections import Counter
from collections.abc import Sequence

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_backbone(model: nn.Module) -> None:
    """Leaves trainable only the KFDE blocks, wherever they are, and the classifier.

    Args:
        model: A timm model; changed in place.
    """
    classifier = {id(parameter) for parameter in model.get_classifier().parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "kfde" in name.split(".") or id(parameter) in classifier


def set_train(model: nn.Module) -> None:
    """Puts a model into training, but not a batch norm whose weights are frozen: its statistics stay, too."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, with neither decay on vectors nor, below 1, an equal rate in all layers."""
    return create_optimizer_v2(
        model,
        opt="adamw",
        lr=args.lr,
        weight_decay=args.weight_decay,
        layer_decay=args.layer_decay if args.layer_decay < 1 else None,
    )


def make_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """Linear warm-up, then a cosine to 0, counted in updates."""
    warmup_epochs = min(args.warmup_epochs, args.epochs - 1)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=args.epochs - warmup_epochs,
        warmup_epochs=warmup_epochs,
        warmup_prefix=True,  # the cosine starts at its top where the warm-up ends
        warmup_lr=args.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def make_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Mixup and cutmix, by turns where both are wanted; None where neither is."""
    if not args.mixup and not args.cutmix:
        return None
    return Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)


class Loss(nn.Module):
    """Mean cross-entropy over the images of a batch, in nats, for targets that are classes or probabilities."""

    def __init__(self, targets: Sequence[int], num_classes: int, class_weights: bool, smoothing: float) -> None:
        """Weighs the classes, if asked to, so that each has the same share in an epoch.

        Args:
            targets: Classes of the training images.
            num_classes: How many there are; one without an image weighs nothing.
            class_weights: Whether to weigh them. The mean weight of an image is 1.
            smoothing: Share of each target that is spread over all classes; for targets that are classes.
        """
        super().__init__()
        counts, present = Counter(targets), len(set(targets))
        weight = [len(targets) / (present * counts[k]) if counts[k] else 0.0 for k in range(num_classes)]
        self.register_buffer("weight", torch.tensor(weight) if class_weights else None)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Computes the mean of (B, classes) logits against (B,) classes or (B, classes) probabilities."""
        smoothing = self.smoothing if targets.ndim == 1 else 0.0  # mixup has smoothed its targets itself
        # Not F.cross_entropy's own mean: that divides by the weights in the batch, and so depends on how images are
        # divided among processes.
        return F.cross_entropy(logits.float(), targets, self.weight, reduction="none", label_smoothing=smoothing).mean()
