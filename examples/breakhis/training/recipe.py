"""The parts of a training, made by timm and torch from the flags of a run."""

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

from breakhis.baselines.gauss_error import GaussErrorScheduler


def freeze_backbone(model: nn.Module) -> None:
    """Freeze all parameters except those of the KFDE blocks, wherever they are, and the classifier.

    Args:
        model: A timm model; changed in place.
    """
    classifier = {id(parameter) for parameter in model.get_classifier().parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "kfde" in name.split(".") or id(parameter) in classifier


def set_train(model: nn.Module) -> None:
    """Set a model to training mode, except batch norms with frozen weights, whose statistics stay frozen too."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Make timm's optimiser, without decay on vectors; if `layer_decay` is below 1, earlier layers get a lower rate."""
    return create_optimizer_v2(
        model,
        opt=args.opt,
        lr=args.lr,
        weight_decay=args.weight_decay,
        layer_decay=args.layer_decay if args.layer_decay < 1 else None,
    )


def make_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """Make a schedule of linear warm-up and then a cosine or the Gauss error function, counted in updates."""
    warmup_epochs = min(args.warmup_epochs, args.epochs - 1)
    if args.gauss_error is not None:
        alpha, beta = args.gauss_error
        return GaussErrorScheduler(
            optimizer,
            (args.epochs - warmup_epochs) * updates_per_epoch,
            alpha=alpha,
            beta=beta,
            lr_min=args.min_lr,
            warmup_t=warmup_epochs * updates_per_epoch,
            warmup_lr_init=args.lr / 100,
            t_in_epochs=False,
        )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=args.epochs - warmup_epochs,
        warmup_epochs=warmup_epochs,
        warmup_prefix=True,  # the cosine starts at its maximum when the warm-up ends
        warmup_lr=args.lr / 100,
        min_lr=args.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def make_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Make mixup and cutmix, which alternate at random if both are switched on; None if neither is."""
    if not args.mixup and not args.cutmix:
        return None
    return Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)


class Loss(nn.Module):
    """Compute the mean cross-entropy over a batch, in nats, for targets that are classes or probabilities."""

    def __init__(self, targets: Sequence[int], num_classes: int, class_weights: bool, smoothing: float) -> None:
        """Compute the weights of the classes that give each class the same share of an epoch.

        Args:
            targets: Classes of the training images.
            num_classes: Number of classes; a class without an image has weight 0.
            class_weights: Whether to use the weights. The mean weight of an image is 1.
            smoothing: Share of each target that is spread over all classes, if targets are classes.
        """
        super().__init__()
        counts, present = Counter(targets), len(set(targets))
        weight = [len(targets) / (present * counts[k]) if counts[k] else 0.0 for k in range(num_classes)]
        self.register_buffer("weight", torch.tensor(weight) if class_weights else None)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compare (B, classes) logits with (B,) classes or (B, classes) probabilities."""
        smoothing = self.smoothing if targets.ndim == 1 else 0.0  # mixup has already smoothed its targets
        # The mean of F.cross_entropy would divide by the weights in the batch, and so depend on how the images are
        # divided among processes.
        return F.cross_entropy(logits.float(), targets, self.weight, reduction="none", label_smoothing=smoothing).mean()
