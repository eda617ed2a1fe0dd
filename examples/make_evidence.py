"""Runs the studies of `examples/evidence/*.yaml`, and keeps what they found beside them.

    python examples/make_evidence.py idc --data-dir IDC --output-dir runs/evidence
    python examples/make_evidence.py breakhis-binary --data-dir BreaKHis_v1 --output-dir runs/evidence

What is kept, in `examples/evidence/<study>/`: `results.json`, `results.csv` and `results.md` as the study wrote them,
and `predictions.csv`, from which the numbers can be computed again, to the four digits that are kept.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from breakhis.tables import read_csv, write_csv
from train_breakhis import main as train

STUDIES = Path(__file__).with_name("evidence")


def keep_predictions(folders: Sequence[Path], path: Path) -> None:
    """Writes the predictions of many runs as one CSV: an image a row, a variant, seed and class a column.

    Args:
        folders: Of the runs. All seeds and variants have the same folds, so that an image is in one.
        path: The file. Probabilities have four digits.
    """
    table: dict[str, dict[str, str]] = {}
    for folder in folders:
        run = json.loads((folder / "metrics.json").read_text())
        column = f"{run['variant']} seed {run['seed']}"
        for row in read_csv(folder / "predictions.csv"):
            known = {key: row[key] for key in ("file", "patient", "target")} | {"fold": run["fold"]}
            line = table.setdefault(row["file"], known)
            line |= {f"{column} {key}": f"{float(row[key]):.4f}" for key in row if key.startswith("prob_")}
    write_csv(path, list(table.values()))


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
