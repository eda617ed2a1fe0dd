"""The command line of the trainer."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from breakhis.data.sources import BREAKHIS, PROTOCOLS, SOURCES, TESTED_CASES
from breakhis.training.argument_types import (
    MAX_WORKERS,
    SIDES,
    Parser,
    fold,
    mapping,
    number,
    path,
    positive,
    sha256,
    shard,
)

ABLATION: dict[str, dict[str, Any]] = {
    "baseline": {"csfe": False, "mfdf": False},
    "CSFE": {"mfdf": False},
    "MFDF": {"csfe": False},
    "KFDE": {},
}
MAX_SEED = 2**32 - 1  # of NumPy's and scikit-learn's generators
MAX_FOLDS = 1000  # more than any data set has patients; each is a run with `--folds all`
PRIMARY_SCORES = ("image_accuracy", "patient_recognition_rate", "balanced_accuracy", "auc")
SWITCH = argparse.BooleanOptionalAction  # the command line can switch off what a file switches on


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of every flag."""
    parser = Parser(
        prog="train_breakhis.py",
        description="Train timm models on breast-cancer histopathology and score them on unseen patients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # an abbreviation in a file of flags could mean another flag in the next version
    )
    for add_flags in (
        _add_run_flags,
        _add_data_flags,
        _add_protocol_flags,
        _add_study_flags,
        _add_model_flags,
        _add_recipe_flags,
    ):
        add_flags(parser)
    return parser


def make_variant_parser(error: Callable[[str], NoReturn]) -> argparse.ArgumentParser:
    """Make the parser of the flags that a variant may change; it reports by `error` what is wrong with a value."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.error = error
    _add_model_flags(parser)
    _add_recipe_flags(parser)
    return parser


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the run itself."""
    group = parser.add_argument_group("run")
    group.add_argument("--config", type=path, default=None, help="YAML file of flags; the command line goes before it")
    group.add_argument(
        "--output-dir", type=path, required=True, default=argparse.SUPPRESS, help="directory for all results"
    )
    group.add_argument(
        "--resume", action=SWITCH, default=False, help="go on where a run into this directory was cut off, or start"
    )
    group.add_argument(
        "--overwrite",
        action=SWITCH,
        default=False,
        help="replace earlier runs in this directory; without this flag or --resume they are refused",
    )
    group.add_argument(
        "--shard",
        type=shard,
        default=None,
        help="do every N-th run only, from the I-th: I/N, one command for each I, on one or several machines",
    )
    group.add_argument(
        "--num-workers",
        type=number(int, 0, MAX_WORKERS),
        default=2,
        help=f"processes that load images, at most {MAX_WORKERS}; 0: the main process does",
    )
    group.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        default=None,
        help="precision of the forward pass; unset leaves it to `accelerate launch`",
    )


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the images."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=sorted(SOURCES), default="breakhis", help="data set in DATA_DIR")
    group.add_argument("--data-dir", type=path, default=None, help="directory with the images at any depth")
    group.add_argument("--download", action=SWITCH, default=False, help="fetch BreakHis, 4 GB, into DATA_DIR first")
    group.add_argument("--archive-sha256", type=sha256, default=None, help="hash that the fetched archive must have")
    group.add_argument(
        "--synthetic",
        action=SWITCH,
        default=False,
        help="draw a small BreakHis under OUTPUT_DIR/synthetic and train on that",
    )
    group.add_argument(
        "--strict",
        action=SWITCH,
        default=False,
        help="refuse a data set with unusable files instead of leaving them out",
    )
    group.add_argument(
        "--task", choices=("binary", "subtype"), default="binary", help="two classes, or BreakHis' eight"
    )
    group.add_argument(
        "--magnification",
        nargs="+",
        choices=(*BREAKHIS.magnifications, "all", "pooled"),
        default=None,
        help="one run for each; all: the four; pooled: one run on all images; unset: 100X of BreakHis",
    )


def _add_protocol_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the division into training, validation and test."""
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="patient",
        help="patient: no patient on two sides; official: the authors' lists; image: at random, leaks patients",
    )
    group.add_argument(
        "--group-by",
        choices=("case", "patient"),
        default="case",
        help="images that stay on one side together; slides of one case may count as several patients",
    )
    group.add_argument(
        "--num-folds", type=number(int, 2, MAX_FOLDS), default=5, help="number of folds; official has five"
    )
    group.add_argument("--folds", nargs="+", type=fold, default=[0], help="test folds from 0, one run for each; or all")
    group.add_argument("--fold", dest="folds", nargs="+", type=fold, default=[0], help="the same as --folds")
    group.add_argument(
        "--fold-dir", type=path, default=None, help="directory with the authors' lists, dsfold1.txt to dsfold5.txt"
    )
    group.add_argument(
        "--score-on",
        choices=("test", "val"),
        default="test",
        help="images that are scored; val: while you choose settings",
    )
    group.add_argument(
        "--split-seed", type=number(int, 0, MAX_SEED), default=0, help="shuffles patients before they are split"
    )


def _add_study_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ask for several runs, and those that all runs share."""
    group = parser.add_argument_group("study")
    group.add_argument("--question", default=None, help="what the study asks, for its results")
    group.add_argument("--primary-score", choices=PRIMARY_SCORES, default=None, help="score that answers it")
    group.add_argument(
        "--margin", type=number(float, 0, 1), default=0.01, help="largest difference of that score that does not matter"
    )
    group.add_argument(
        "--ablation",
        action=SWITCH,
        default=False,
        help="one run without blocks, with each alone and with all: those of --insert, else CSFE and MFDF, at the last "
        "point of a model that has none",
    )
    group.add_argument(
        "--variants",
        type=mapping,
        default={},
        help="one run for each: a YAML mapping from names to model arguments, and to flags of the model and the recipe",
    )
    group.add_argument(
        "--model-kwargs", type=mapping, default={}, help="further arguments of the model, a YAML mapping"
    )
    seed = number(int, 0, MAX_SEED)
    group.add_argument("--seeds", nargs="+", type=seed, default=[0], help="seeds of training, one run for each")
    group.add_argument("--seed", dest="seeds", nargs="+", type=seed, default=[0], help="the same as --seeds")
    group.add_argument(
        "--channels-last",
        action=SWITCH,
        default=False,
        help="train with channels as the last dimension in memory, which many processors compute faster",
    )
    group.add_argument("--grad-accum-steps", type=number(int, 1), default=1, help="batches per update")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model."""
    group = parser.add_argument_group("model")
    share = number(float, 0, 1)
    group.add_argument("--model", default="kfde_convnextv2_atto", help="a timm model")
    group.add_argument(
        "--insert",
        type=mapping,
        default={},
        help="blocks at points of the model, a YAML mapping such as '{blocks.4: [csfe, {mfdf: {kernel_sizes: [3]}}]}'; "
        "also simam, and se, eca, cbam and the other attention layers of timm",
    )
    group.add_argument(
        "--identity-start",
        action=SWITCH,
        default=None,
        help="start with blocks that change nothing; unset: where the model starts from weights",
    )
    group.add_argument("--pretrained", action=SWITCH, default=False, help="start from timm's weights (needs a network)")
    group.add_argument(
        "--checkpoint-path",
        type=path,
        default=None,
        help="start from the weights in this file, except those of the classifier",
    )
    group.add_argument(
        "--checkpoint-sha256", type=sha256, default=None, help="hash that this file must have; config.yaml records it"
    )
    group.add_argument(
        "--freeze-backbone", action=SWITCH, default=False, help="train only the blocks and the classifier"
    )
    group.add_argument("--drop-path", type=share, default=None, help="stochastic depth; unset leaves it to the model")
    group.add_argument(
        "--img-size", type=number(int, SIDES[0], SIDES[-1]), default=224, help="height and width of the input, px"
    )
    group.add_argument(
        "--crop-mode",
        choices=("center", "squash", "border"),
        default="center",
        help="what evaluation sees of a field: its centre, all of it pressed into a square, or all with a border",
    )


def _add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the training."""
    group = parser.add_argument_group("recipe")
    count, share, rate = number(int, 1), number(float, 0, 1), number(float, 0)
    group.add_argument("--epochs", type=count, default=10, help="passes over the training images")
    group.add_argument("--batch-size", type=count, default=8, help="images per step, over all processes")
    group.add_argument("--lr", type=positive, default=1e-4, help="peak learning rate")
    group.add_argument("--min-lr", type=rate, default=0, help="last learning rate")
    group.add_argument(
        "--gauss-error",
        nargs=2,
        type=number(float, -10, 10),
        default=None,
        metavar=("ALPHA", "BETA"),
        help="lower the rate along this piece of the Gauss error function, such as -3 3, instead of a cosine",
    )
    group.add_argument("--warmup-epochs", type=rate, default=1, help="epochs of linear warm-up")
    group.add_argument(
        "--opt", choices=("adamw", "sgd"), default="adamw", help="optimiser; sgd: with Nesterov momentum 0.9"
    )
    group.add_argument("--weight-decay", type=rate, default=0.05, help="weight decay")
    group.add_argument(
        "--layer-decay",
        type=number(float, 0.01, 1),
        default=1,
        help="factor on the rate, layer by layer from the head",
    )
    group.add_argument(
        "--ema-decay",
        type=share,
        default=0,
        help="decay of the average of the weights, which is scored and saved instead of them",
    )
    group.add_argument("--mixup", type=rate, default=0, help="alpha of mixup; 0: none")
    group.add_argument("--cutmix", type=rate, default=0, help="alpha of cutmix; 0: none")
    group.add_argument("--smoothing", type=share, default=0, help="label smoothing")
    group.add_argument(
        "--color-jitter",
        type=number(float, 0, 2.5),
        default=0.2,
        help="random change of brightness, contrast and saturation",
    )
    group.add_argument(
        "--stain-jitter", type=share, default=0, help="random change of the amounts of haematoxylin and eosin"
    )
    group.add_argument(
        "--tested-cases",
        choices=TESTED_CASES,
        default="whole",
        help="to measure a leak on the same images, halved: test half of each case's images and leave out the others; "
        "leaked: train on these others, in place of as many images",
    )
    group.add_argument("--class-weights", action=SWITCH, default=False, help="weigh classes by their inverse frequency")
