"""Trains a timm model on BreakHis, and scores it on patients that it has never seen.

    python examples/train_breakhis.py --synthetic --output-dir OUT
    python examples/train_breakhis.py --data-dir BreaKHis_v1 --magnification 200X --task subtype --output-dir OUT

Several processes: `accelerate launch --num_processes 2 examples/train_breakhis.py ...`.
"""

import argparse
import json
import logging
import math
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import sklearn
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from breakhis.checkpoints import PRETRAINED_NOTE, build_model, eval_transform, load_model, save_model, train_transform
from breakhis.data import CLASSES, MAGNIFICATIONS, BreakHisDataset, find_images
from breakhis.engine import predict, train_one_epoch
from breakhis.figures import draw_confusion_matrix, draw_curves
from breakhis.metrics import balanced_accuracy, score
from breakhis.report import describe_protocol, log_split, summarise, write_predictions, write_split
from breakhis.splits import Split, absent_classes, image_split, patient_split, patients
from breakhis.synthetic import draw_tree
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.nn import functional as F
from torch.utils.data import DataLoader

import kfde_layers  # registers the kfde_* models with timm

logger = logging.getLogger("breakhis")


def _at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer that is not below `minimum`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return integer


def _positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {value}")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `argv` stands for it in tests."""
    parser = argparse.ArgumentParser(
        description="Train a timm model on BreakHis and score it on patients it has never seen.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-dir", type=Path, default=argparse.SUPPRESS, help="directory with BreakHis at any depth")
    source.add_argument(
        "--synthetic",
        action="store_true",
        default=argparse.SUPPRESS,
        help="draw a small data set of BreakHis' form under OUTPUT_DIR/synthetic and train on that",
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, default=argparse.SUPPRESS, help="where every result is written"
    )
    parser.add_argument(
        "--task", choices=sorted(CLASSES), default="binary", help="benign against malignant, or the eight tumour types"
    )
    parser.add_argument("--magnification", choices=(*MAGNIFICATIONS, "all"), default="100X", help="which images to use")
    parser.add_argument(
        "--protocol",
        choices=("patient", "image"),
        default="patient",
        help="patient: no patient is in both training and test; image: random 70/30, leaks patients",
    )
    parser.add_argument("--folds", type=_at_least(2), default=5, help="number of folds over patients")
    parser.add_argument("--fold", type=_at_least(0), default=0, help="which fold is the test set, from 0")
    parser.add_argument("--model", default="kfde_convnextv2_atto", help="a timm model")
    parser.add_argument(
        "--pretrained", action="store_true", help="start from ImageNet weights (needs a network; CC BY-NC 4.0)"
    )
    parser.add_argument("--img-size", type=_at_least(32), default=224, help="height and width of the input, px")
    parser.add_argument("--epochs", type=_at_least(1), default=10, help="passes over the training images")
    parser.add_argument("--batch-size", type=_at_least(1), default=8, help="images per step and process")
    parser.add_argument(
        "--lr", type=_positive, default=1e-4, help="peak learning rate of AdamW, after one epoch of warm-up"
    )
    parser.add_argument("--weight-decay", type=float, default=0.05, help="weight decay of AdamW")
    parser.add_argument(
        "--num-workers", type=_at_least(0), default=2, help="processes that load images; 0 loads inline"
    )
    parser.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        default=None,
        help="precision of the forward pass; unset leaves it to `accelerate launch`",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights, the order and the drawn images")
    args = parser.parse_args(argv)
    if not timm.is_model(args.model):
        parser.error(f"argument --model: must be a model that timm knows, got {args.model!r}")
    if "data_dir" in args and not args.data_dir.is_dir():
        parser.error(f"argument --data-dir: must be a directory, got {str(args.data_dir)!r}")
    if args.protocol == "patient" and args.fold >= args.folds:
        parser.error(f"argument --fold: must be below --folds {args.folds}, got {args.fold}")
    return args


def find_split(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Path, Split]:
    """Finds the images, drawing them first if asked to, and splits them.

    Returns:
        The data directory, and the split.
    """
    data_dir = getattr(args, "data_dir", args.output_dir / "synthetic")
    if "synthetic" in args and accelerator.is_main_process:
        wanted = MAGNIFICATIONS if args.magnification == "all" else (args.magnification,)
        logger.info("drew %d images in %s", draw_tree(data_dir, args.seed, wanted), data_dir)
    accelerator.wait_for_everyone()
    images = find_images(data_dir, args.magnification)
    if args.protocol == "patient":
        return data_dir, patient_split(images, args.task, args.folds, args.fold, args.seed)
    return data_dir, image_split(images, args.task, args.seed)


def describe_run(args: argparse.Namespace, accelerator: Accelerator, split: Split) -> dict[str, Any]:
    """What `metrics.json` says besides the scores."""
    parts = split.parts()
    return {
        "protocol": args.protocol,
        "task": args.task,
        "magnification": args.magnification,
        "folds": split.folds,
        "fold": None if split.folds is None else args.fold,
        "seed": args.seed,
        "synthetic": "synthetic" in args,
        "model": args.model,
        "pretrained": args.pretrained,
        "img_size": args.img_size,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "num_processes": accelerator.num_processes,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "mixed_precision": accelerator.mixed_precision,
        "classes": list(CLASSES[args.task]),
        "n_images": {name: len(images) for name, images in parts.items()},
        "n_patients": {name: len(patients(images)) for name, images in parts.items()},
        "absent_classes": {name: absent_classes(images, args.task) for name, images in parts.items()},
        "versions": {
            "python": platform.python_version(),
            "kfde_layers": kfde_layers.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "accelerate": accelerate.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }


def fit(args: argparse.Namespace, accelerator: Accelerator, split: Split) -> tuple[list[dict[str, float]], int]:
    """Trains, and writes `last` after each epoch and `best` after each epoch that is the best so far on validation.

    Returns:
        A row of losses and validation scores for each epoch, and the number of the best epoch, from 1.
    """
    classes = CLASSES[args.task]
    set_seed(args.seed)
    model, model_args = build_model(args.model, len(classes), args.img_size, args.pretrained)
    train_data = BreakHisDataset(split.train, args.task, train_transform(model))
    val_data = BreakHisDataset(split.val, args.task, eval_transform(model))
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    order = torch.Generator().manual_seed(args.seed)
    train_loader = accelerator.prepare(DataLoader(train_data, shuffle=True, generator=order, **loading))
    val_loader = accelerator.prepare(DataLoader(val_data, **loading))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=args.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=args.epochs,
        warmup_epochs=min(1, args.epochs - 1),
        warmup_lr=args.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(args.seed, device_specific=True)  # each process augments its own images in its own way

    history: list[dict[str, float]] = []
    best_epoch, best_rank = args.epochs, (-1.0, 0.0)
    for epoch in range(args.epochs):
        row = {
            "epoch": epoch + 1,
            "train_loss": train_one_epoch(accelerator, model, train_loader, optimizer, scheduler, epoch),
        }
        folders = [args.output_dir / "last"]
        if split.val:
            logits, targets = predict(accelerator, model, val_loader), torch.tensor(val_data.targets)
            row["val_loss"] = F.cross_entropy(logits, targets).item()
            row["val_balanced_accuracy"] = balanced_accuracy(val_data.targets, logits.argmax(1).tolist())
            row["val_image_accuracy"] = (logits.argmax(1) == targets).float().mean().item()
            rank = (row["val_balanced_accuracy"], -row["val_loss"])
            if rank > best_rank:
                best_epoch, best_rank = epoch + 1, rank
                folders.append(args.output_dir / "best")
        elif epoch + 1 == args.epochs:
            folders.append(args.output_dir / "best")
        history.append(row)
        logger.info(", ".join(f"{key} {value:.4g}" for key, value in row.items()))
        if accelerator.is_main_process:
            for folder in folders:
                save_model(accelerator.unwrap_model(model), folder, classes, model_args)
    accelerator.wait_for_everyone()
    return history, best_epoch


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example and returns what it wrote to `metrics.json`."""
    args = parse_args(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.pretrained and "convnextv2" in args.model:
        logger.info(PRETRAINED_NOTE)

    data_dir, split = find_split(args, accelerator)
    log_split(split, args.task)
    history, best_epoch = fit(args, accelerator, split)

    # The test set is looked at here, for the first and only time, through the checkpoint as it was written, and in
    # float32 whatever the training ran in, so that whoever loads the checkpoint gets the same numbers.
    model = load_model(args.output_dir / "best").to(accelerator.device)
    test_data = BreakHisDataset(split.test, args.task, eval_transform(model))
    loader = accelerator.prepare(DataLoader(test_data, batch_size=args.batch_size, num_workers=args.num_workers))
    logits = predict(accelerator, model, loader)

    patient_ids = [image.patient_id for image in split.test]
    metrics = describe_run(args, accelerator, split) | {"best_epoch": best_epoch, "history": history}
    metrics |= score(test_data.targets, logits.argmax(1).tolist(), patient_ids, len(metrics["classes"]))
    if accelerator.is_main_process:
        out, title = args.output_dir, describe_protocol(metrics)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        write_split(out / "split.csv", split, data_dir)
        write_predictions(out / "predictions.csv", split.test, logits.softmax(1).tolist(), args.task, data_dir)
        draw_confusion_matrix(metrics["confusion_matrix"], metrics["classes"], title, out / "confusion_matrix.png")
        draw_curves(history, best_epoch, title, out / "curves.png")
        print(summarise(metrics))
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    main()
