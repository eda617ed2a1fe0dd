"""Run the studies of `examples/evidence/*.yaml`, and keep their results next to them.

    python examples/make_evidence.py idc --data-dir IDC --output-dir runs/evidence
    python examples/make_evidence.py breakhis-binary --data-dir BreaKHis_v1 --output-dir runs/evidence

A study whose name has "lite" in it starts from ImageNet weights: first run `examples/lite_weights.py 0
weights/lite0.safetensors`, and the same for 1, in the folder where the study is started.

`examples/evidence/<study>/` keeps `results.json`, `results.csv` and `results.md` as the study wrote them, and
`predictions.csv`, from which the scores can be computed again, up to the four digits that are kept.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from breakhis.commands import one_line_errors, run_script
from breakhis.files import write_atomically, write_csv
from breakhis.results.runs import read_metrics, read_predictions
from breakhis.training.argument_types import Parser
from breakhis.training.argument_types import path as file_path
from train_breakhis import main as train

STUDIES = Path(__file__).with_name("evidence")


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


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; a study that was interrupted goes on."""
    parser = Parser(description="Run a study of examples/evidence and keep its results.")
    parser.add_argument("study", choices=sorted(path.stem for path in STUDIES.glob("*.yaml")))
    parser.add_argument("--data-dir", required=True, help="directory with the study's images")
    parser.add_argument("--output-dir", type=file_path, required=True, help="directory for the runs, in STUDY/")
    parser.add_argument("--shard", default=None, help="I/N: do every N-th run only, from the I-th")
    args = parser.parse_args(argv)
    out, evidence = args.output_dir / args.study, STUDIES / args.study
    flags = ["--config", str(STUDIES / f"{args.study}.yaml"), "--data-dir", args.data_dir, "--output-dir", str(out)]
    train([*flags, "--resume", *(["--shard", args.shard] if args.shard else [])])
    if not (out / "results.md").is_file():  # other shards are not finished
        return
    evidence.mkdir(exist_ok=True)
    for name in ("results.json", "results.csv", "results.md"):
        write_atomically(evidence / name, partial(shutil.copyfile, out / name))
    keep_predictions(sorted((out / "runs").iterdir()), evidence / "predictions.csv")


if __name__ == "__main__":
    run_script(main)
