"""Run the studies of `examples/evidence/*.yaml`, and keep their results next to them.

    python examples/make_evidence.py idc --data-dir IDC --output-dir runs/evidence
    python examples/make_evidence.py breakhis-binary --data-dir BreaKHis_v1 --output-dir runs/evidence
    accelerate launch examples/make_evidence.py paper --data-dir BreaKHis_v1 --output-dir runs/paper --num-workers 12

`paper` is the three tables of the paper, `paper-*.yaml`, each with the images divided by image and by case. It first
prints how many runs that is, and after the first epoch how long they will take. The same command goes on after an
interruption. `--shard 1/3`, `2/3` and `3/3` divide the runs among processes or machines that share the output folder;
the one that ends last writes the tables.

A study whose name has "lite" in it starts from ImageNet weights: first run `examples/lite_weights.py 0
weights/lite0.safetensors`, and the same for 1, in the folder where the study is started.

`examples/evidence/<study>/` keeps `results.json`, `results.csv` and `results.md` as the study wrote them, and
`predictions.csv`, from which the scores can be computed again, up to the four digits that are kept.
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
        path: The file. Probabilities have four digits.
    """
    table: dict[str, dict[str, str]] = {}
    for folder in folders:
        run = read_metrics(folder, ("variant", "seed", "fold", "classes"))
        column = f"{run['variant']} seed {run['seed']}"
        for row in read_predictions(folder, run["classes"]):
            image = {key: row[key] for key in ("file", "patient", "case", "target")} | {"fold": run["fold"]}
            line = table.setdefault(row["file"], image)
            line |= {f"{column} {key}": f"{float(row[key]):.4f}" for key in row if key.startswith("prob_")}
    write_csv(path, list(table.values()))


def keep_results(out: Path, folder: Path) -> None:
    """Copy the results of a finished study, and keep its predictions.

    Args:
        out: Folder of the study.
        folder: Folder that keeps the results.
    """
    folder.mkdir(exist_ok=True)
    for name in ("results.json", "results.csv", "results.md"):
        write_atomically(folder / name, partial(shutil.copyfile, out / name))
    keep_predictions(sorted((out / "runs").iterdir()), folder / "predictions.csv")


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
    return "\n".join([*lines, f"left to this process: {len(left)} runs, {epochs} epochs; the first one will be timed"])


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; a study that was interrupted goes on."""
    parser = Parser(
        description="Run a study of examples/evidence, or the paper's tables, and keep the results. Further flags are "
        "those of train_breakhis.py."
    )
    parser.add_argument("study", choices=sorted([*(path.stem for path in STUDIES.glob("*.yaml")), "paper"]))
    parser.add_argument("--data-dir", required=True, help="directory with the study's images")
    parser.add_argument("--output-dir", type=file_path, required=True, help="directory for the runs, in STUDY/")
    known, further = parser.parse_known_args(argv)
    common = ["--data-dir", known.data_dir, "--resume", *further]
    studies = {
        name: parse_args([*flags, *common, "--output-dir", str(known.output_dir / name)])
        for name, flags in list_studies(known.study).items()
    }
    from breakhis.runner import leave_processes, run, unfinished  # late, as in train_breakhis.py
    from breakhis.training.time_left import TimeLeft

    main_process = os.environ.get("RANK", "0") == "0"
    left = [run for args in studies.values() for run in unfinished(args)]
    time_left = TimeLeft(left)
    if main_process:
        print(describe_plan(studies, left))
    for name, args in studies.items():
        run(args, time_left)
        # Without the tables, other shards are not finished.
        if main_process and (args.output_dir / "results.md").is_file():
            keep_results(args.output_dir, STUDIES / name)
    leave_processes()


if __name__ == "__main__":
    run_script(main)
