"""Finished runs to explain, and the arguments that figures are drawn from."""

import json
from pathlib import Path
from typing import Any

import explain_breakhis
import pytest
import timm
import torch
from breakhis.data.naming import find_breakhis
from breakhis.files import write_csv
from breakhis.training.checkpoints import hash_checkpoint, save_model

from tests.support.runs import SUBTYPES

DRAWINGS = {name: getattr(explain_breakhis, name) for name in ("draw_map_panels", "draw_gates", "draw_branch_weights")}
METRICS = {"dataset": "breakhis", "synthetic": False, "task": "subtype", "magnification": "100X", "scored_on": "test"}
METRICS |= {"protocol_in_words": "patient protocol", "fold_in_words": "fold 0 of 3", "classes": SUBTYPES}


def explain(out: Path, *more: str) -> tuple[int, dict[str, tuple]]:
    """Run the script; return its exit code, and the arguments that each file was drawn from."""
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in DRAWINGS.items():

            def keep(*args, function=function):
                drawn[args[-1].name] = args[:-1]
                function(*args)

            patch.setattr(explain_breakhis, name, keep)
        return explain_breakhis.main(["--runs", str(out), "--device", "cpu", *more]), drawn


def write_run(
    out: Path, tree: Path, model: str | None, variant: str, fold: int = 0, seed: int = 0, **arguments: Any
) -> Path:
    """Write a finished run, with an untrained model of timm or none, that has tested the first patient of each class.

    Args:
        out: Folder of the study.
        tree: Folder of the images.
        model: Name of the model.
        variant: Name of the variant.
        fold: Number of the fold, which changes nothing else.
        seed: Number of the seed, which changes nothing else.
        arguments: Arguments of the model.

    Returns:
        The folder of the run.
    """
    folder = out / "runs" / f"{variant}-100X-fold{fold}-seed{seed}"
    folder.mkdir(parents=True)
    records = [record for record in find_breakhis(tree).records if record.patient_id.endswith("1")]
    rows = [
        {"file": record.path.relative_to(tree).as_posix(), "patient": record.patient_id, "case": record.case_id}
        | {"target": record.labels["subtype"], "prediction": "A"}
        | {f"prob_{name}": 1 / len(SUBTYPES) for name in SUBTYPES}
        for record in records
    ]
    write_csv(folder / "predictions.csv", rows)
    metrics = METRICS | {"variant": variant, "fold": fold, "seed": seed, "flags": {"data_dir": str(tree)}}
    metrics["best_sha256"] = {}
    if model is not None:
        config = {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "center"}
        torch.manual_seed(0)
        net = timm.create_model(model, num_classes=len(SUBTYPES), pretrained_cfg_overlay=config, **arguments)
        save_model(net, folder / "best", SUBTYPES, {"model_args": arguments})
        metrics["best_sha256"] = hash_checkpoint(folder / "best")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def change_metrics(run: Path, **changes: object) -> None:
    metrics = json.loads((run / "metrics.json").read_text()) | changes
    (run / "metrics.json").write_text(json.dumps(metrics))


def written_files(out: Path) -> set[str]:
    return {path.name for path in (out / "explain").iterdir()}
