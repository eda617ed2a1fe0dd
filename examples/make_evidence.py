"""Run the studies of `examples/evidence/*.yaml`, and keep their results next to them.

    python examples/make_evidence.py idc --data-dir IDC --output-dir runs/evidence
    python examples/make_evidence.py breakhis-binary --data-dir BreaKHis_v1 --output-dir runs/evidence
    accelerate launch examples/make_evidence.py paper --data-dir BreaKHis_v1 --output-dir runs/paper --num-workers 12

`paper` is the three tables of the paper, `paper-*.yaml`, each with the images divided by image and by case. It first
prints how many runs that is, and after the first epoch how long they will take. The same command goes on after an
interruption. `--shard 1/3`, `2/3` and `3/3` divide the runs among machines that share the output folder. The one that
ends last writes the tables, and keeps the results in its own checkout.

A study whose name has "lite" in it starts from ImageNet weights: first run `examples/lite_weights.py 0
weights/lite0.safetensors`, and the same for 1, in the folder where the study is started.

`examples/evidence/<study>/` keeps `results.json`, `results.csv` and `results.md` as the study wrote them, and
`predictions.csv`, from which the scores can be computed again, up to the nine digits that are kept.
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from breakhis.commands import one_line_errors, run_script
from breakhis.files import write_atomically, write_csv
from breakhis.results.runs import read_metrics, read_predictions
from breakhis.training.argument_types import Parser
from breakhis.training.argument_types import path as file_path
from breakhis.training.options import expand, parse_args

STUDIES = Path(__file__).with_name("evidence")
TABLES = ("paper-binary", "paper-subtype", "paper-ablation")
PROTOCOLS = {"image": "image", "case": "patient"}
"""What the name of a table's results ends in, and the protocol of the trainer."""


def keep_predictions(folders: Sequence[Path], path: Path) -> None:
    """Write the predictions of many runs as one CSV file: a row for each image, a column for each model and class.

    Args:
        folders: Folders of the runs. All seeds and variants have the same folds, and each image is tested in one fold.
        path: The file. Probabilities have the nine digits of float32: a network that is sure of much has many near 0.
    """
    table: dict[str, dict[str, str]] = {}
    for folder in folders:
        run = read_metrics(folder, ("variant", "seed", "fold", "classes"))
        column = f"{run['variant']} seed {run['seed']}"
        for row in read_predictions(folder, run["classes"]):
            image = {key: row[key] for key in ("file", "patient", "case", "target")} | {"fold": run["fold"]}
            line = table.setdefault(row["file"], image)
            line |= {f"{column} {key}": f"{float(row[key]):.9g}" for key in row if key.startswith("prob_")}
    write_csv(path, list(table.values()))


def keep_results(args: argparse.Namespace, folder: Path) -> None:
    """Copy the results of a finished study, and keep its predictions.

    Args:
        args: Flags of the study.
        folder: Folder that keeps the results.
    """
    folder.mkdir(exist_ok=True)
    keep_predictions([run.output_dir for run in expand(args)], folder / "predictions.csv")
    for name in ("results.json", "results.csv", "results.md"):
        write_atomically(folder / name, partial(shutil.copyfile, args.output_dir / name))


def list_studies(study: str) -> dict[str, list[str]]:
    """List the studies that a name of the command line stands for, each with its flags of the trainer."""
    if study != "paper":
        return {study: ["--config", str(STUDIES / f"{study}.yaml")]}
    return {
        f"{table}-{name}": ["--config", str(STUDIES / f"{table}.yaml"), "--protocol", protocol]
        for table in TABLES
        for name, protocol in PROTOCOLS.items()
    }


def describe_plan(studies: dict[str, argparse.Namespace], left: Sequence[argparse.Namespace]) -> str:
    """Say how many runs there are in all, and how many of them are left to this process."""
    lines = [f"{name}: {len(args.variants)} methods, {len(expand(args))} runs" for name, args in studies.items()]
    epochs = sum(run.epochs for run in left)
    timed = "; the first epoch will be timed" if left else ""
    return "\n".join([*lines, f"left to this process: {len(left)} runs, {epochs} epochs{timed}"])


def is_main_process() -> bool:
    """Return whether this process prints. `accelerate launch` sets both variables, other launchers `RANK` alone."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; a study that was interrupted goes on."""
    parser = Parser(description="Run a study of examples/evidence, or the paper's tables, and keep the results.")
    single = {path.stem for path in STUDIES.glob("*.yaml")} - set(TABLES)
    parser.add_argument("study", choices=sorted({*single, "paper"}))
    parser.add_argument("--data-dir", required=True, help="directory with the study's images")
    parser.add_argument("--output-dir", type=file_path, required=True, help="directory for the runs, in STUDY/")
    parser.add_argument("--shard", default=None, help="I/N: do every N-th run only, from the I-th")
    parser.add_argument("--num-workers", default=None, help="processes that load images")
    parser.add_argument("--mixed-precision", default=None, help="precision of the forward pass: no, bf16 or fp16")
    chosen = parser.parse_args(argv)
    common = ["--data-dir", chosen.data_dir, "--resume"]
    for flag in ("shard", "num_workers", "mixed_precision"):
        if (value := getattr(chosen, flag)) is not None:
            common += [f"--{flag.replace('_', '-')}", value]
    studies = {
        name: parse_args([*flags, *common, "--output-dir", str(chosen.output_dir / name)])
        for name, flags in list_studies(chosen.study).items()
    }
    from breakhis.runner import leave_processes, run, unfinished  # late, as in train_breakhis.py
    from breakhis.training.resume import METRICS
    from breakhis.training.time_left import TimeLeft

    left = [left_run for args in studies.values() for left_run in unfinished(args)]
    time_left = TimeLeft(left)
    if is_main_process():
        print(describe_plan(studies, left))
    for name, args in studies.items():
        run(args, time_left)
        if is_main_process() and all((done.output_dir / METRICS).is_file() for done in expand(args)):
            keep_results(args, STUDIES / name)
    leave_processes()


if __name__ == "__main__":
    run_script(main)
