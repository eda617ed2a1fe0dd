"""The images that the flags ask for, and their division."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from breakhis.data.download import download
from breakhis.data.images import find_faults
from breakhis.data.leak import halve_tested_cases, leak_tested_cases
from breakhis.data.records import Record
from breakhis.data.sources import BREAKHIS, SOURCES
from breakhis.data.splits import Split, fold_split, official_split
from breakhis.data.synthetic import draw_tree
from breakhis.names import printable

logger = logging.getLogger(__name__)


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
            count = draw_tree(data_dir, seed=0, magnifications=magnifications)
            logger.info("drew %d images in %s", count, printable(data_dir))
    accelerator.wait_for_everyone()
    records, misnamed = SOURCES[args.dataset].find(data_dir)
    faults = find_faults([record.path for record in records]) if accelerator.is_main_process else {}
    (faults,) = broadcast_object_list([faults])
    for path, reason in {**misnamed, **faults}.items():
        logger.warning("left out %s: %s", printable(path), reason)
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
    if args.tested_cases != "whole":
        split, others = halve_tested_cases(split)
        if args.tested_cases == "leaked":
            split = leak_tested_cases(split, others, args.task, args.split_seed)
    if not split.parts()[args.score_on]:
        raise ValueError(f"--score-on must name a part with images, got {args.score_on!r}, which has none")
    return split
