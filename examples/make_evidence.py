"""Runs the studies of `examples/evidence/*.yaml`, and keeps what they found beside them.

    python examples/make_evidence.py idc --data-dir IDC --output-dir runs/evidence
    python examples/make_evidence.py breakhis-binary --data-dir BreaKHis_v1 --output-dir runs/evidence

What is kept, in `examples/evidence/<study>/`: `results.json`, `results.csv` and `results.md` as the study wrote them,
and `predictions.csv`, from which every number can be computed again.
"""

import argparse
import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

from train_breakhis import main as train

STUDIES = Path(__file__).with_name("evidence")


def keep_predictions(folders: Sequence[Path], path: Path) -> None:
    """Writes the predictions of many runs as one CSV: an image a row, a run and class a column.

    Args:
        folders: Of the runs; each is the name of its columns, as in "KFDE-pooled-fold0-seed0 prob_carcinoma". Folds
            stand in one column, which is named without them, because they are of different images.
        path: The file. Probabilities have four digits.
    """
    table: dict[str, dict[str, str]] = {}
    for folder in folders:
        run = "-".join(part for part in folder.name.split("-") if not part.startswith("fold"))
        with (folder / "predictions.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                line = table.setdefault(row["file"], {key: row[key] for key in ("file", "patient", "target")})
                line |= {f"{run} {key}": f"{float(row[key]):.4f}" for key in row if key.startswith("prob_")}
    columns = list(dict.fromkeys(key for line in table.values() for key in line))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script; a study that was cut off goes on."""
    parser = argparse.ArgumentParser(description="Run a study of examples/evidence and keep what it finds.")
    parser.add_argument("study", choices=sorted(path.stem for path in STUDIES.glob("*.yaml")))
    parser.add_argument("--data-dir", required=True, help="directory with the study's images")
    parser.add_argument("--output-dir", type=Path, required=True, help="where the runs are written, in STUDY/")
    args = parser.parse_args(argv)
    out, kept = args.output_dir / args.study, STUDIES / args.study
    config = ["--config", str(STUDIES / f"{args.study}.yaml"), "--data-dir", args.data_dir]
    train([*config, "--output-dir", str(out), "--resume"])
    kept.mkdir(exist_ok=True)
    for name in ("results.json", "results.csv", "results.md"):
        shutil.copyfile(out / name, kept / name)
    keep_predictions(sorted((out / "runs").iterdir()), kept / "predictions.csv")


if __name__ == "__main__":
    main()
