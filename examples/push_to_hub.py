"""Publish the model of a finished run on the Hugging Face Hub, with a card that says how it was tested.

    python examples/push_to_hub.py --run OUT --repo-id you/name --output-dir DIR
    python examples/push_to_hub.py --run OUT --repo-id you/name

OUT is the output directory of `train_breakhis.py`, or the folder of one run of a study. The first line writes the files
to a folder and needs no network; read the card there. The second line pushes them, as the user of `hf auth login`.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any

from breakhis.commands import one_line_errors, run_script
from breakhis.files import real_path, write_atomically
from breakhis.mappings import read_json
from breakhis.names import in_markdown
from breakhis.results.report import PARTS, describe_protocol
from breakhis.results.runs import read_metrics
from breakhis.training.argument_types import Parser, path
from breakhis.training.checkpoints import check_checkpoint, load_model, save_model
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from timm import list_models
from torch import nn

import kfde_layers  # noqa: F401 -- registers the kfde_* models with timm

# The second one is the base error of the Hub's HTTP client, which depends on the version of huggingface_hub.
HUB_ERRORS = (HfHubHTTPError, *HfHubHTTPError.__bases__)
TEMPLATE = Path(__file__).with_name("model_card.md")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
OWN_LICENCE = "apache-2.0"
BASELINES = [path.stem for path in (Path(__file__).parent / "breakhis/baselines").glob("*.py")]
"""Modules of the example's own systems."""
LOAD_WITH_BLOCKS = """{register}
import json
from pathlib import Path

import timm
import torch
from huggingface_hub import snapshot_download
from kfde_layers import insert
from PIL import Image
from safetensors.torch import load_model

folder = Path(snapshot_download("{repo_id}"))
inserted = json.loads((folder / "config.json").read_text())["inserted"]
model = timm.create_model(f"local-dir:{{folder}}", pretrained=False)
insert(model, inserted["blocks"], identity_start=inserted["identity_start"])
load_model(model, folder / "model.safetensors")
model.eval()"""
SCORES = {
    "image_accuracy": "image accuracy",
    "patient_recognition_rate": "patient recognition rate",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auc": "area under the ROC curve",
    "ece": "expected calibration error",
}
SYNTHETIC = "drawn by a program, similar to BreakHis. They show no real tissue."
SOURCES = {
    "breakhis": "[BreakHis](https://web.inf.ufpr.br/vri/databases/breast-cancer-histopathological-database-breakhis/) "
    "(Spanhol, Oliveira, Petitjean, Heutte, 2016).",
    "idc": "patches of invasive ductal carcinoma (Cruz-Roa et al., 2014; Janowczyk and Madabhushi, 2016).",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, or `argv` if it is not None."""
    parser = Parser(
        description="Publish the model of a finished run on the Hugging Face Hub, with its card.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    required = {"required": True, "default": argparse.SUPPRESS}
    parser.add_argument("--run", type=path, **required, help="output directory of one run of train_breakhis.py")
    parser.add_argument("--repo-id", **required, help="owner/name on the Hub; the repository is made if needed")
    parser.add_argument("--output-dir", type=path, help="write the files to this directory, and push nothing")
    parser.add_argument("--private", action="store_true", help="make a new repository a private one")
    args = parser.parse_args(argv)
    for name in ("metrics.json", "best/config.json", "best/model.safetensors"):
        if not (args.run / name).is_file():
            parser.error(f"argument --run: must be the folder of a finished run, with {name}, got {str(args.run)!r}")
    if args.output_dir is not None and args.output_dir.exists():
        if not args.output_dir.is_dir():
            parser.error(f"argument --output-dir: must be a directory, got the file {str(args.output_dir)!r}")
        if real_path(args.output_dir).is_relative_to(real_path(args.run)):
            parser.error(f"argument --output-dir: must not lie in --run, got {str(args.output_dir)!r}")
    if not REPO_ID.fullmatch(args.repo_id):
        parser.error(f"argument --repo-id: must be owner/name, got {args.repo_id!r}")
    return args


def write_card(repo_id: str, model: nn.Module, metrics: dict[str, Any]) -> str:
    """Fill the template of the card.

    Args:
        repo_id: Name of the repository on the Hub.
        model: The model from `load_model`.
        metrics: `metrics.json` of its run.
    """
    config, flags, scored = model.pretrained_cfg, metrics["flags"], metrics["scored_on"]
    licence = config.get("license") or OWN_LICENCE  # the trainer drops it if no weights were loaded
    _, height, width = config["input_size"]
    scores = [("undefined" if metrics[key] is None else f"{metrics[key]:.3f}") for key in SCORES]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        license=licence,
        license_words=_licence_words(licence),
        name=repo_id.split("/")[1],
        repo_id=repo_id,
        model=metrics["model"],
        version=metrics["versions"]["kfde_layers"],
        classes=in_markdown(", ".join(metrics["classes"])),
        input=f"RGB, {height} x {width} px",
        load=_load_code(repo_id, metrics["model"], bool(flags["insert"])),
        inserted=in_markdown(str(flags["insert"])) if flags["insert"] else "none",
        start=_start(flags),
        source=SYNTHETIC if metrics["synthetic"] else SOURCES[metrics["dataset"]],
        protocol=in_markdown(describe_protocol(metrics)),
        parts="\n".join(_part_row(metrics, part) for part in PARTS),
        best_epoch=metrics["best_epoch"],
        epochs=len(metrics["history"]),
        chosen_on="validation" if metrics["n_images"]["val"] else "no criterion: it is the last one",
        seed=metrics["seed"],
        scored_on=PARTS[scored],
        n_images=metrics["n_images"][scored],
        n_patients=metrics["n_patients"][scored],
        scores="\n".join(f"| {name} | {value} |" for name, value in zip(SCORES.values(), scores, strict=True)),
        limits="\n".join(f"- {limit}" for limit in _limits(metrics)),
    )


def _licence_words(licence: str) -> str:
    """Write the licence, and a warning if it forbids commercial use."""
    noncommercial = ": not for commercial use, like the weights that training started from" if "-nc-" in licence else ""
    return f"{licence}{noncommercial}"


def _load_code(repo_id: str, model: str, has_blocks: bool) -> str:
    """Write the lines that load the model. timm alone puts no blocks in, and does not know the example's systems."""
    register = "import kfde_layers  # registers the model with timm"
    if model in list_models(module=BASELINES):
        register = "import breakhis.baselines  # of the folder examples/ of kfde-layers; registers the model with timm"
    if not has_blocks:
        create = f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()'
        return f"{register}\nimport timm\nimport torch\nfrom PIL import Image\n\n{create}"
    return LOAD_WITH_BLOCKS.format(register=register, repo_id=repo_id)


def _start(flags: dict[str, Any]) -> str:
    """Name the weights that training started from."""
    if flags["checkpoint_path"] is not None:
        return f"a checkpoint with SHA-256 {in_markdown(flags['checkpoint_sha256'])}"
    return "the ImageNet weights that timm has for the backbone" if flags["pretrained"] else "random weights"


def _part_row(metrics: dict[str, Any], part: str) -> str:
    """Write the row of training, validation or test."""
    absent = in_markdown(", ".join(metrics["absent_classes"][part])) or "none"
    return f"| {PARTS[part]} | {metrics['n_images'][part]} | {metrics['n_patients'][part]} | {absent} |"


def _limits(metrics: dict[str, Any]) -> list[str]:
    """List the limits of the scores."""
    scored = metrics["scored_on"]
    limits = [
        f"The scores come from {metrics['n_patients'][scored]} patients, {metrics['n_cases'][scored]} cases, one "
        "division of them and one seed: scores on other patients may be very different.",
        "All images are of one data set. Other laboratories, stains, scanners and magnifications were not tested.",
    ]
    if metrics["synthetic"]:
        limits.append("The images are drawn: the scores show that the program works, and nothing about medicine.")
    if metrics["n_shared"]:
        limits.append(
            f"{metrics['n_shared']} of the {metrics['n_images']['test']} test images are of cases that training or "
            "validation has too, which inflates every score."
        )
    if metrics["protocol"] == "image":
        limits.append("Images of one patient are in both training and test, which inflates every score.")
    if scored == "val":
        limits.append("The scores are of the images that the checkpoint was chosen on, so they are too good.")
    return limits


def read_scored(run: Path) -> dict[str, Any]:
    """Read the `metrics.json` of a run, and check that its scores are those of `best`.

    Raises:
        ValueError: The file is damaged, or `best` is another checkpoint than the run has scored.
    """
    metrics = read_metrics(run, ("best_sha256",))
    check_checkpoint(run / "best", metrics["best_sha256"])
    return metrics


def write(folder: Path, model: nn.Module, card: str, config: dict[str, Any]) -> None:
    """Write the model and its card to a folder."""
    save_model(model, folder, config["label_names"], config)
    write_atomically(folder / "README.md", lambda part: part.write_text(card, encoding="utf-8"))


def push(folder: Path, repo_id: str, private: bool) -> None:
    """Push the files of a folder; the repository is made if needed.

    Raises:
        OSError: The Hub cannot be reached, or refuses.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    except HUB_ERRORS as error:
        raise OSError(f"--repo-id {repo_id} cannot be pushed: {error or type(error).__name__}") from error


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    args = parse_args(argv)
    folder = args.run / "best"
    metrics = read_scored(args.run)
    model, config = load_model(folder), read_json(folder / "config.json")
    try:
        card = write_card(args.repo_id, model, metrics)
    except (KeyError, TypeError) as error:  # of an entry that is missing, or is no number or list
        raise ValueError(f"{args.run / 'metrics.json'} must be written by train_breakhis.py, got {error!r}") from error
    if args.output_dir is not None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write(args.output_dir, model, card, config)
        print(f"wrote {args.output_dir}")
        return 0
    with TemporaryDirectory() as folder:
        write(Path(folder), model, card, config)
        push(Path(folder), args.repo_id, args.private)
    print(f"pushed https://huggingface.co/{args.repo_id}")
    return 0


if __name__ == "__main__":
    run_script(main)
