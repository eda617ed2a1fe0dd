"""Train timm models on breast-cancer histopathology, and score them on patients that they have never seen.

    python examples/train_breakhis.py --synthetic --output-dir OUT
    python examples/train_breakhis.py --data-dir BreaKHis_v1 --magnification 200X --task subtype --output-dir OUT
    python examples/train_breakhis.py --data-dir BreaKHis_v1 --folds all --magnification all --ablation --output-dir OUT

Several processes: `accelerate launch --num_processes 2 examples/train_breakhis.py ...`.
"""

import argparse
import copy
import json
import logging
import platform
import shutil
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import sklearn
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, broadcast_object_list
from breakhis.commands import one_line_errors, run_script
from breakhis.data.download import download
from breakhis.data.images import find_faults
from breakhis.data.naming import BREAKHIS
from breakhis.data.records import ImageDataset, Record, patients
from breakhis.data.splits import Split, absent_classes, fold_split, official_split
from breakhis.data.synthetic import draw_tree
from breakhis.files import read_csv, write_atomically, write_csv
from breakhis.results.figures import draw_calibration, draw_confusion_matrix, draw_curves, draw_roc
from breakhis.results.metrics import score
from breakhis.results.report import describe_protocol, log_split, prediction_rows, split_rows, summarise
from breakhis.results.study import write_study
from breakhis.training.checkpoints import PRETRAINED_NOTE, eval_transform, load_model
from breakhis.training.engine import predict
from breakhis.training.fit import STATE, fit
from breakhis.training.flags import SOURCES
from breakhis.training.options import differences, expand, parse_args, recorded
from torch.utils.data import DataLoader

import kfde_layers  # registers the kfde_* models with timm

logger = logging.getLogger("breakhis")

CONFIG, DIVISION, METRICS = "config.yaml", "split.csv", "metrics.json"


def find_records(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Path, list[Record]]:
    """Find the images, and leave out files that cannot be used. Fetch or draw the images first if a flag says so.

    Returns:
        The data directory, and the records.

    Raises:
        ValueError: There is no image; or, with `--strict`, an image is misnamed or cannot be read.
    """
    data_dir = args.output_dir / "synthetic" if args.synthetic else args.data_dir
    if accelerator.is_main_process:
        if args.download:
            download(data_dir, args.archive_sha256)
        if args.synthetic:
            magnifications = BREAKHIS.magnifications if "pooled" in args.magnification else args.magnification
            logger.info("drew %d images in %s", draw_tree(data_dir, seed=0, magnifications=magnifications), data_dir)
    accelerator.wait_for_everyone()
    records, misnamed = SOURCES[args.dataset].find(data_dir)
    faults = find_faults([record.path for record in records]) if accelerator.is_main_process else {}
    (faults,) = broadcast_object_list([faults])
    for path, reason in {**misnamed, **faults}.items():
        logger.warning("left out %s: %s", path, reason)
    if misnamed or faults:
        unusable = f"{len(misnamed)} misnamed files, and {len(faults)} of {len(records)} images that cannot be read"
        if args.strict:
            raise ValueError(f"data_dir must hold usable images alone with --strict, got {unusable}, named above")
        logger.warning("WARNING: left out %s", unusable)
    return data_dir, [record for record in records if record.path not in faults]


def make_split(args: argparse.Namespace, records: Sequence[Record]) -> Split:
    """Split the images of a run's magnification by its protocol, and refuse an empty part to score."""
    chosen = [record for record in records if args.magnification in ("pooled", record.magnification)]
    if not chosen:
        existing = ", ".join(sorted({record.magnification for record in records}))
        raise ValueError(f"--magnification must be one that the images have, {existing}, got {args.magnification}")
    if args.protocol == "official":
        fold_file = args.fold_dir / f"dsfold{args.fold + 1}.txt"
        split = official_split(chosen, args.task, args.group_by, fold_file, args.split_seed)
    else:
        group_by = "image" if args.protocol == "image" else args.group_by
        split = fold_split(chosen, args.task, group_by, args.num_folds, args.fold, args.split_seed)
    if not split.parts()[args.score_on]:
        raise ValueError(f"--score-on must name a part with images, got {args.score_on!r}, which has none")
    return split


def describe_run(args: argparse.Namespace, accelerator: Accelerator, split: Split) -> dict[str, Any]:
    """Make the content of `metrics.json` without the scores."""
    classes, parts = SOURCES[args.dataset].classes[args.task], split.parts()
    return {
        "dataset": args.dataset,
        "synthetic": args.synthetic,
        "protocol": args.protocol,
        "protocol_in_words": split.protocol + (", validation" if args.score_on == "val" else ""),
        "fold_in_words": split.fold,
        "scored_on": args.score_on,
        "task": args.task,
        "magnification": args.magnification,
        "fold": args.fold,
        "seed": args.seed,
        "variant": args.variant,
        "model": args.model,
        "classes": list(classes),
        "n_images": {name: len(records) for name, records in parts.items()},
        "n_patients": {name: len(patients(records)) for name, records in parts.items()},
        "absent_classes": {name: absent_classes(records, args.task, classes) for name, records in parts.items()},
        "flags": recorded(args),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {
            "python": platform.python_version(),
            "kfde_layers": kfde_layers.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "accelerate": accelerate.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }


def run_once(args: argparse.Namespace, accelerator: Accelerator, data_dir: Path, split: Split) -> dict[str, Any]:
    """Train, test and write one run, or its missing part; return its `metrics.json`.

    Raises:
        ValueError: The run would go on with other flags, or another division of the images, than it was started with.
    """
    out, classes = args.output_dir, SOURCES[args.dataset].classes[args.task]
    if args.resume and (metrics := resume(args, data_dir, split)) is not None:
        return metrics
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        begin(args, data_dir, split)
    accelerator.wait_for_everyone()

    log_split(split, args.task, classes)
    history, best_epoch = fit(args, accelerator, split, classes)

    # The test images are used here, for the first and only time. The model is the saved checkpoint, in float32 with any
    # training precision, so that everybody who loads the checkpoint gets the same numbers.
    model = load_model(out / "best").to(accelerator.device)
    scored = split.parts()[args.score_on]
    data = ImageDataset(scored, args.task, classes, eval_transform(model))
    loader = accelerator.prepare(DataLoader(data, batch_size=args.batch_size, num_workers=args.num_workers))
    probabilities = predict(accelerator, model, loader).softmax(1).tolist()

    metrics = describe_run(args, accelerator, split) | {"best_epoch": best_epoch, "history": history}
    metrics |= score(data.targets, probabilities, [record.patient_id for record in scored])
    if accelerator.is_main_process:
        write_csv(out / "predictions.csv", prediction_rows(scored, probabilities, args.task, classes, data_dir))
        draw_figures(metrics, data.targets, probabilities, out)
        # Last, because this file marks the run as finished.
        write_atomically(out / METRICS, lambda part: part.write_text(json.dumps(metrics, indent=2) + "\n"))
        (out / STATE).unlink(missing_ok=True)
        print(summarise(metrics))
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return metrics


def resume(args: argparse.Namespace, data_dir: Path, split: Split) -> dict[str, Any] | None:
    """Check that a run may go on; return its `metrics.json` if it is finished."""
    out = args.output_dir
    if not (out / CONFIG).is_file():
        return None
    if changed := differences(yaml.safe_load((out / CONFIG).read_text()), recorded(args)):
        raise ValueError(f"--resume must go on with the flags that {out} was started with: {'; '.join(changed)}")
    division = out / DIVISION
    if division.is_file() and read_csv(division) != split_rows(split, data_dir):
        # With another division, patients that were trained on could now be tested.
        raise ValueError(f"--resume must find the images that {out} was started with, as {division} lists them")
    if (out / METRICS).is_file():
        logger.info("%s is finished", out)
        return json.loads((out / METRICS).read_text())
    return None


def begin(args: argparse.Namespace, data_dir: Path, split: Split) -> None:
    """Write the flags and the division of the images; without `--resume`, first remove results of an earlier run."""
    out = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for name in (METRICS, STATE, DIVISION):
            (out / name).unlink(missing_ok=True)
        for name in ("best", "last"):
            shutil.rmtree(out / name, ignore_errors=True)
    write_atomically(out / CONFIG, lambda part: part.write_text(yaml.safe_dump(recorded(args), sort_keys=False)))
    write_csv(out / DIVISION, split_rows(split, data_dir))


def draw_figures(
    metrics: dict[str, Any], targets: Sequence[int], probabilities: Sequence[Sequence[float]], out: Path
) -> None:
    """Draw the confusion matrix, the curves of training, ROC curves and calibration."""
    classes, title = metrics["classes"], describe_protocol(metrics)
    draw_confusion_matrix(metrics["confusion_matrix"], classes, title, out / "confusion_matrix.png")
    draw_curves(metrics["history"], metrics["best_epoch"], title, out / "curves.png")
    draw_roc(targets, probabilities, classes, title, out / "roc.png")
    draw_calibration(targets, probabilities, title, out / "calibration.png")


@one_line_errors
def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the script; return the `metrics.json` of each run."""
    args = parse_args(argv)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.grad_accum_steps,
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # the processes share each batch
        # The other processes wait while one process downloads and checks the images.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if args.batch_size % accelerator.num_processes:
        raise ValueError(
            f"--batch-size must be a multiple of the {accelerator.num_processes} processes, got {args.batch_size}"
        )
    if args.pretrained and "convnextv2" in args.model:
        logger.info(PRETRAINED_NOTE)
    args.mixed_precision = accelerator.mixed_precision  # `accelerate launch` may have set it
    scaler = copy.deepcopy(accelerator.scaler)
    data_dir, records = find_records(args, accelerator)
    runs = expand(args)
    splits = [make_split(run, records) for run in runs]  # all of them now, so that no run fails after hours
    results = []
    for run, split in zip(runs, splits, strict=True):
        accelerator.scaler = copy.deepcopy(scaler)  # for fp16: a run must not depend on earlier runs
        results.append(run_once(run, accelerator, data_dir, split))
    if len(runs) > 1 and accelerator.is_main_process:
        print(write_study(args.output_dir, [run.output_dir for run in runs]))
    accelerator.end_training()
    return results


if __name__ == "__main__":
    run_script(main)
