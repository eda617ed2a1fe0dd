"""Whether a run may go on where it was cut off: with the same flags, and with the same images down to each byte.

`config.yaml` and `split.csv` say what the run was started with, and `state.pt` says it again, so that the state of
another run is not taken for that of this one.
"""

import csv
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from accelerate import Accelerator

import kfde_layers
from breakhis.files import read_csv, write_atomically, write_csv
from breakhis.mappings import read_json, read_yaml
from breakhis.names import printable
from breakhis.training.options import differences
from breakhis.training.state import STATE

logger = logging.getLogger(__name__)

CONFIG, DIVISION, METRICS = "config.yaml", "split.csv", "metrics.json"
RESULTS = (METRICS, STATE, "best", "last")
"""What a run without its `config.yaml` and `split.csv` cannot be trusted in."""


def make_way(folders: Sequence[Path], overwrite: bool) -> None:
    """Let earlier runs be replaced, or refuse it, since they may have taken days.

    Args:
        folders: Folders of all runs that will be done.
        overwrite: Whether earlier runs are replaced. None of them is then finished any more, or can go on, so that
            `--resume` after an interruption takes none for a new one.

    Raises:
        ValueError: A folder holds a run that is finished, or that can go on; the message names it.
    """
    for folder in folders:
        for name, kind, use in ((METRICS, "finished", "keeps it"), (STATE, "unfinished", "goes on with it")):
            if overwrite:
                (folder / name).unlink(missing_ok=True)
            elif (folder / name).is_file():
                raise ValueError(
                    f"--output-dir must have no {kind} run, got {folder} with {name}: --resume {use}, "
                    "--overwrite replaces it"
                )


def find_finished(out: Path, flags: dict[str, Any], rows: Sequence[dict[str, str]]) -> dict[str, Any] | None:
    """Check that a run may go on, or start, in a folder; return its `metrics.json` if it is finished.

    Args:
        out: Folder of the run.
        flags: The flags now.
        rows: The rows of `split.csv` as the images are now.

    Raises:
        ValueError: The flags or the images are others than at the start, or a file that says so is missing or damaged.
    """
    for name in (CONFIG, DIVISION):
        leftovers = [result for result in RESULTS if (out / result).exists()]
        if leftovers and not (out / name).is_file():
            raise ValueError(
                f"--resume must find {name} next to {leftovers[0]}, got none in {out}: nothing else says what the run "
                "was started with. With --overwrite instead of --resume, it starts again"
            )
    if (out / CONFIG).is_file() and (changed := differences(read_yaml(out / CONFIG), flags)):
        raise ValueError(f"--resume must go on with the flags that {out} was started with: {'; '.join(changed)}")
    if (out / DIVISION).is_file() and (changed := _changed_rows(_read_rows(out / DIVISION), rows)):
        # With another division, patients that were trained on could now be tested.
        further = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"--resume must find the images that {out} was started with, as {out / DIVISION} lists them: "
            f"{'; '.join(changed[:3])}{further}"
        )
    if (out / METRICS).is_file():
        logger.info("%s is finished", printable(out))
        return read_json(out / METRICS)
    return None


def _read_rows(path: Path) -> dict[str, dict[str, str]]:
    """Read the rows of `split.csv`, by file."""
    try:
        return {row["file"]: row for row in read_csv(path)}
    except (KeyError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} must be a table that this script wrote, got {error!r}") from error


def _changed_rows(before: dict[str, dict[str, str]], rows: Sequence[dict[str, str]]) -> list[str]:
    """Describe the images that are not as before, such as "a.png: sha256 was 12, now 34"."""
    now = {row["file"]: row for row in rows}
    changed = [f"{name} is missing" for name in before if name not in now]
    changed += [f"{name} is new" for name in now if name not in before]
    for name in before.keys() & now.keys():
        changed += [f"{name}: {difference}" for difference in differences(before[name], now[name])]
    return sorted(changed)


def begin(out: Path, flags: dict[str, Any], rows: Sequence[dict[str, str]], resume: bool) -> None:
    """Write the flags and the division of the images; without `resume`, first remove results of an earlier run."""
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        for name in ("best", "last"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (METRICS, STATE, DIVISION, CONFIG):  # the flags last: they say what the results are of
            (out / name).unlink(missing_ok=True)
    write_atomically(out / CONFIG, lambda part: part.write_text(yaml.safe_dump(flags, sort_keys=False), "utf-8"))
    write_csv(out / DIVISION, rows)


def identify(flags: dict[str, Any], rows: Sequence[dict[str, str]], accelerator: Accelerator) -> dict[str, Any]:
    """Return everything that the weights of a run depend on, for its `state.pt`.

    On a CPU the number of threads is part of it: sums of floating-point numbers are divided among threads. Other
    versions of the libraries may order them otherwise too.
    """
    on_cpu = accelerator.device.type == "cpu"
    return flags | {
        "images (SHA-256 of their rows)": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads (OMP_NUM_THREADS)": torch.get_num_threads() if on_cpu else None,
        "torch": str(torch.__version__),  # a class of its own, which a safe reader refuses
        "timm": timm.__version__,
        "kfde_layers": kfde_layers.__version__,
    }
