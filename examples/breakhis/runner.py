"""Do the runs that the flags ask for, one after the other: find the images, divide them, train, score, draw, report."""

import argparse
import copy
import json
import logging
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import sklearn
import timm
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, broadcast_object_list
from torch.utils.data import DataLoader

import kfde_layers  # registers the kfde_* models with timm
from breakhis.chosen import find_records, make_split
from breakhis.data.hashes import changed_files, hash_files
from breakhis.data.records import ImageDataset, cases, patients
from breakhis.data.sources import SOURCES
from breakhis.data.splits import Split, absent_classes, shared_cases
from breakhis.files import remove_parts, write_atomically, write_csv
from breakhis.mappings import read_yaml
from breakhis.results.metrics import score
from breakhis.results.report import log_crop, log_split, prediction_rows, split_rows, summarise
from breakhis.results.run_figures import draw_figures
from breakhis.results.study import write_study
from breakhis.training.checkpoints import PRETRAINED_NOTE, build_model, check_checkpoint, eval_transform, load_model
from breakhis.training.engine import predict
from breakhis.training.fit import fit
from breakhis.training.lock import lock_folder
from breakhis.training.options import differences, expand, recorded
from breakhis.training.resume import CONFIG, METRICS, begin, find_finished, identify, make_way
from breakhis.training.state import STATE
from breakhis.training.time_left import TimeLeft

logger = logging.getLogger("breakhis")


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
        "n_cases": {name: len(cases(records)) for name, records in parts.items()},
        "n_shared": len(shared_cases(split)),
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


def run_once(
    args: argparse.Namespace,
    accelerator: Accelerator,
    data_dir: Path,
    split: Split,
    hashes: Mapping[Path, str],
    time_left: TimeLeft,
) -> dict[str, Any]:
    """Train, test and write one run, or its missing part; return its `metrics.json`.

    Args:
        args: Flags of the run.
        accelerator: Holds the device, the precision and the other processes.
        data_dir: Directory of the images.
        split: The division of the images.
        hashes: SHA-256 of each image at the start.
        time_left: Learns how long each epoch takes.

    Raises:
        ValueError: The run would go on with other flags or images than it was started with, or something changed what
            it reads or its checkpoint meanwhile.
    """
    out, classes, flags = args.output_dir, SOURCES[args.dataset].classes[args.task], recorded(args)
    rows = split_rows(split, data_dir, hashes)
    if args.resume and (metrics := find_finished(out, flags, rows)) is not None:
        return metrics
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        begin(out, flags, rows, args.resume)
    accelerator.wait_for_everyone()

    log_split(split, args.task, classes)
    log_crop(args.crop_mode, split.train[0].path)
    progress = fit(args, accelerator, split, classes, identify(flags, rows, accelerator), time_left)

    # The test images are used here, for the first and only time. The model is the saved checkpoint, in float32 with any
    # training precision, so that everybody who loads the checkpoint gets the same numbers.
    check_checkpoint(out / "best", progress.best_files)
    model = load_model(out / "best").to(accelerator.device)
    scored = split.parts()[args.score_on]
    data = ImageDataset(scored, args.task, classes, eval_transform(model))
    loader = accelerator.prepare(DataLoader(data, batch_size=args.batch_size, num_workers=args.num_workers))
    probabilities = predict(accelerator, model, loader, out / "best").softmax(1).tolist()
    inputs = {record.path: hashes[record.path] for part in split.parts().values() for record in part}
    check_inputs(accelerator, inputs | ({args.checkpoint_path: args.checkpoint_sha256} if args.checkpoint_path else {}))

    metrics = describe_run(args, accelerator, split) | {"best_epoch": progress.best_epoch, "history": progress.history}
    metrics |= {"best_sha256": progress.best_files}
    metrics |= score(data.targets, probabilities, [record.patient_id for record in scored])
    if accelerator.is_main_process:
        write_csv(out / "predictions.csv", prediction_rows(scored, probabilities, args.task, classes, data_dir))
        draw_figures(metrics, data.targets, probabilities, out)
        # Last, because this file marks the run as finished.
        text = json.dumps(metrics, indent=2) + "\n"
        write_atomically(out / METRICS, lambda part: part.write_text(text, encoding="utf-8"))
        (out / STATE).unlink(missing_ok=True)
        print(summarise(metrics))
        print(f"The files of the run are in {out}, its model in {out / 'best'}.")
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return metrics


def check_inputs(accelerator: Accelerator, hashes: Mapping[Path, str]) -> None:
    """Refuse to score a run whose images, or the weights that it started from, changed since its start.

    Args:
        accelerator: Holds the other processes.
        hashes: SHA-256 of each file at the start.

    Raises:
        ValueError: A file was replaced, changed or removed; the message names the first one.
    """
    changed = changed_files(hashes) if accelerator.is_main_process else []
    (changed,) = broadcast_object_list([changed])
    if changed:
        raise ValueError(
            f"the files that a run reads must not change during it, got {len(changed)} changed, such as {changed[0]}"
        )


@contextmanager
def locked(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the lock of an output folder in the main process, and remove files that a killed run has half written.

    If the lock is refused, all processes raise the error.

    Raises:
        ValueError: Another run holds the lock.
    """
    with ExitStack() as stack:
        refusal = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(lock_folder(folder))
                for place in (folder, folder / "best", folder / "last"):
                    remove_parts(place)
            except (OSError, ValueError) as error:
                refusal = error
        (refusal,) = broadcast_object_list([refusal])
        if refusal is not None:
            raise refusal
        yield


def check_models(runs: Sequence[argparse.Namespace]) -> None:
    """Build the model of each variant once, at random weights, so that none fails after hours."""
    for run in {run.variant: run for run in runs}.values():
        without_weights = argparse.Namespace(**vars(run) | {"pretrained": False, "checkpoint_path": None})
        build_model(without_weights, len(SOURCES[run.dataset].classes[run.task]))


def own_runs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """List the runs that this process does: all of the study, or those of its shard.

    Raises:
        ValueError: There are more shards than runs.
    """
    study = expand(args)
    if args.shard is None:
        return study
    if args.shard.count > len(study):
        raise ValueError(f"--shard must divide the {len(study)} runs of the study, got {args.shard.count} shards")
    return study[args.shard.index - 1 :: args.shard.count]


def unfinished(args: argparse.Namespace) -> list[argparse.Namespace]:
    """List the runs of `own_runs` that are to be done: with `--resume`, those that are not finished."""
    return [run for run in own_runs(args) if not (args.resume and (run.output_dir / METRICS).is_file())]


def run_all(args: argparse.Namespace, accelerator: Accelerator, time_left: TimeLeft | None) -> list[dict[str, Any]]:
    """Find the images, do each run that the flags ask for, and write the tables of a study that is complete."""
    scaler, study, runs = copy.deepcopy(accelerator.scaler), expand(args), own_runs(args)
    if time_left is None:
        time_left = TimeLeft(unfinished(args))
    if not args.resume:
        make_way([run.output_dir for run in runs], args.overwrite)
    check_models(runs)
    data_dir, records = find_records(args, accelerator)
    splits = [make_split(run, records) for run in runs]  # all of them now, so that no run fails after hours
    (hashes,) = broadcast_object_list(
        [hash_files(record.path for record in records) if accelerator.is_main_process else {}]
    )
    results = []
    for number, (run, split) in enumerate(zip(runs, splits, strict=True), start=1):
        accelerator.scaler = copy.deepcopy(scaler)  # for fp16: a run must not depend on earlier runs
        if len(runs) > 1:
            estimate = f", {time_left}" if time_left.timed else ""
            logger.info("run %d of %d: %s%s", number, len(runs), run.output_dir.name, estimate)
        with nullcontext() if len(study) == 1 and args.shard is None else locked(run.output_dir, accelerator):
            results.append(run_once(run, accelerator, data_dir, split, hashes, time_left))
        time_left.end_run(run)
    if len(study) > 1 and accelerator.is_main_process:
        report_study(args.output_dir, study)
    return results


def report_study(out: Path, study: Sequence[argparse.Namespace]) -> None:
    """Write and print the tables of a study, or say how many runs are left for other shards.

    Raises:
        ValueError: Another shard has done a run with other flags.
    """
    folders = [run.output_dir for run in study]
    left = sum(not (folder / METRICS).is_file() for folder in folders)
    if left:
        print(f"{len(folders) - left} of {len(folders)} runs are finished; the shard that ends last writes the tables")
        return
    for run in study:
        if changed := differences(read_yaml(run.output_dir / CONFIG), recorded(run)):
            raise ValueError(f"{run.output_dir} must be of the same study, but {'; '.join(changed)}")
    print(write_study(out, folders))
    print(f"\nThe tables are in {out / 'results.md'}, each run in {out / 'runs'}.")
    print(f"Next: python examples/explain_breakhis.py --runs {out}")


def run(args: argparse.Namespace, time_left: TimeLeft | None = None) -> list[dict[str, Any]]:
    """Do every run that the flags ask for.

    Args:
        args: What `parse_args` returned.
        time_left: Estimates the time of these runs and of those that come after them; None: of these alone.

    Returns:
        The `metrics.json` of each run.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, with a note that says how to go on.
    """
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
    try:
        # Shards share the folder: each run has a lock of its own.
        with locked(args.output_dir, accelerator) if args.shard is None else nullcontext():
            results = run_all(args, accelerator, time_left)
    except KeyboardInterrupt as stop:
        flag = "--resume instead of --overwrite" if args.overwrite else "--resume"
        stop.add_note(f"{args.output_dir} has every complete epoch; the same command with {flag} goes on from there")
        raise
    return results


def leave_processes() -> None:
    """End the work with other processes, if there are any; call it after the last `run`."""
    PartialState().destroy_process_group()
