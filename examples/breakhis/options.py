"""The flags of the trainer, on the command line or in a YAML file, and the runs that they ask for."""

import argparse
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

import kfde_layers  # noqa: F401 -- registers the kfde_* models with timm
from breakhis.idc import IDC
from breakhis.naming import BREAKHIS
from breakhis.splits import PROTOCOLS

SOURCES = {"breakhis": BREAKHIS, "idc": IDC}
ABLATION: dict[str, dict[str, Any]] = {
    "baseline": {"csfe": False, "mfdf": False},
    "CSFE": {"mfdf": False},
    "MFDF": {"csfe": False},
    "KFDE": {},
}
# What may differ between a run and the one that resumes it: it changes no number, or says where the images are, whose
# division is compared by itself.
_MACHINE = ("num_workers", "data_dir", "fold_dir", "download")
_VARIANT = re.compile(r"[\w.+-]+")  # it names a folder

_SWITCH = argparse.BooleanOptionalAction  # so that the command line can switch off what a file switches on


def _number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite number from `low` to `high`."""

    def number(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {value}")
        return value

    number.__name__ = kind.__name__  # argparse puts it into its own message, "invalid int value"
    return number


def _positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {value}")
    return value


def _mapping(text: str) -> dict[str, Any]:
    """An argparse type: a mapping in YAML, such as "{output_stride: 16, csfe: false}"."""
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a mapping in YAML, got {text!r}")
    return value


def torch_device(text: str) -> torch.device:
    """An argparse type: a device of this machine; "auto" is its accelerator, or else the CPU."""
    if text == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, RuntimeError) as error:  # an assertion where PyTorch lacks its backend
        raise argparse.ArgumentTypeError(f"must be 'auto' or a device of this machine, got {text!r}") from error


def _fold(text: str) -> int | str:
    return text if text == "all" else _number(int, 0)(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_breakhis.py",
        description="Train timm models on breast-cancer histopathology and score them on unseen patients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # an abbreviation in a file of flags would mean another flag in the next version
    )
    count, share, rate = _number(int, 1), _number(float, 0, 1), _number(float, 0)

    run = parser.add_argument_group("run")
    run.add_argument("--config", type=Path, default=None, help="YAML file of flags; the command line goes before it")
    run.add_argument("--output-dir", type=Path, required=True, default=argparse.SUPPRESS, help="for every result")
    run.add_argument(
        "--resume", action=_SWITCH, default=False, help="go on where a run into this directory was cut off, or start"
    )
    run.add_argument("--num-workers", type=_number(int, 0), default=2, help="processes that load images; 0: inline")
    run.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        default=None,
        help="precision of the forward pass; unset leaves it to `accelerate launch`",
    )

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=sorted(SOURCES), default="breakhis", help="how DATA_DIR is to be read")
    data.add_argument("--data-dir", type=Path, default=None, help="directory with the images at any depth")
    data.add_argument("--download", action=_SWITCH, default=False, help="fetch BreakHis, 4 GB, into DATA_DIR first")
    data.add_argument(
        "--synthetic",
        action=_SWITCH,
        default=False,
        help="draw a small BreakHis under OUTPUT_DIR/synthetic and train on that",
    )
    data.add_argument(
        "--strict", action=_SWITCH, default=False, help="refuse a data set with unusable files, rather than go on"
    )
    data.add_argument("--task", choices=("binary", "subtype"), default="binary", help="two classes, or BreakHis' eight")
    data.add_argument(
        "--magnification",
        nargs="+",
        choices=(*BREAKHIS.magnifications, "all", "pooled"),
        default=None,
        help="one run for each; all: the four; pooled: one run on all images; unset: 100X of BreakHis",
    )

    split = parser.add_argument_group("protocol")
    split.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="patient",
        help="patient: no patient on two sides; official: the authors' lists; image: at random, leaks patients",
    )
    split.add_argument(
        "--group-by", choices=("patient", "case"), default="patient", help="what is kept on one side; case is stricter"
    )
    split.add_argument("--num-folds", type=_number(int, 2), default=5, help="number of folds; official has five")
    split.add_argument(
        "--folds", nargs="+", type=_fold, default=[0], help="test folds from 0, one run for each; or all"
    )
    split.add_argument("--fold-dir", type=Path, default=None, help="directory with the authors' dsfold1.txt and so on")
    split.add_argument(
        "--score-on",
        choices=("test", "val"),
        default="test",
        help="val: while settings are chosen",
    )
    split.add_argument("--split-seed", type=_number(int, 0), default=0, help="shuffles patients before they are split")

    model = parser.add_argument_group("model")
    model.add_argument("--model", default="kfde_convnextv2_atto", help="a timm model")
    model.add_argument("--model-kwargs", type=_mapping, default={}, help="its further arguments, a YAML mapping")
    model.add_argument(
        "--ablation", action=_SWITCH, default=False, help=f"one run for each of {', '.join(ABLATION)} (a kfde_* model)"
    )
    model.add_argument(
        "--variants", type=_mapping, default={}, help="one run for each: a YAML mapping from names to model arguments"
    )
    model.add_argument(
        "--pretrained", action=_SWITCH, default=False, help="start from timm's weights (needs a network)"
    )
    model.add_argument("--checkpoint-path", type=Path, default=None, help="start from these weights, but for the head")
    model.add_argument(
        "--freeze-backbone", action=_SWITCH, default=False, help="train the KFDE blocks and the classifier only"
    )
    model.add_argument("--drop-path", type=share, default=None, help="stochastic depth; unset leaves it to the model")
    model.add_argument("--img-size", type=_number(int, 32), default=224, help="height and width of the input, px")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=count, default=10, help="passes over the training images")
    recipe.add_argument("--batch-size", type=count, default=8, help="images per step, over all processes")
    recipe.add_argument("--grad-accum-steps", type=count, default=1, help="batches per update")
    recipe.add_argument("--lr", type=_positive, default=1e-4, help="peak learning rate of AdamW, cosine to 0")
    recipe.add_argument("--warmup-epochs", type=rate, default=1, help="epochs of linear warm-up")
    recipe.add_argument("--weight-decay", type=rate, default=0.05, help="of AdamW")
    recipe.add_argument(
        "--layer-decay",
        type=_number(float, 0.01, 1),
        default=1,
        help="factor on the rate, layer by layer from the head",
    )
    recipe.add_argument("--ema-decay", type=share, default=0, help="average of the weights, which is then what is kept")
    recipe.add_argument("--mixup", type=rate, default=0, help="alpha of mixup; 0: none")
    recipe.add_argument("--cutmix", type=rate, default=0, help="alpha of cutmix; 0: none")
    recipe.add_argument("--smoothing", type=share, default=0, help="label smoothing")
    recipe.add_argument("--color-jitter", type=rate, default=0.2, help="of brightness, contrast and saturation")
    recipe.add_argument("--stain-jitter", type=rate, default=0, help="of the amounts of haematoxylin and eosin")
    recipe.add_argument("--class-weights", action=_SWITCH, default=False, help="weigh classes against their frequency")
    recipe.add_argument("--seeds", nargs="+", type=_number(int, 0), default=[0], help="of training; one run for each")
    return parser


def _as_argv(config: dict[str, Any]) -> list[str]:
    """The flags of a YAML mapping as a command line, so that they are checked as one."""
    argv = []
    for key, value in config.items():
        name = str(key).replace("_", "-")
        match value:
            case None:  # as saved where a flag was not given
                continue
            case False if name == "mixed-precision":  # what YAML makes of a bare "no"
                argv += [f"--{name}", "no"]
            case bool():
                argv.append(f"--{name}" if value else f"--no-{name}")
            case dict():
                argv += [f"--{name}", yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)]
            case list():
                argv += [f"--{name}", *map(str, value)]
            case _:
                argv += [f"--{name}", str(value)]
    return argv


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, and the YAML file that it may name.

    Args:
        argv: Stands for the command line in tests.

    Returns:
        The flags, with "all" resolved.

    Raises:
        SystemExit: A flag is wrong; the message says which, and how.
    """
    parser = _parser()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    known, rest = first.parse_known_args(argv)
    if known.config is not None:
        try:
            config = yaml.safe_load(known.config.read_text())
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"argument --config: must be a YAML file that can be read, got {error}")
        if not isinstance(config, dict) or "config" in config:
            parser.error(f"argument --config: must be a mapping from flags to values without config, got {config!r}")
        rest = ["--config", str(known.config), *_as_argv(config), *rest]
    args = parser.parse_args(rest)
    _check(parser, args)
    if args.magnification is None:
        args.magnification = ["100X"] if SOURCES[args.dataset].magnifications else ["pooled"]
    if args.magnification == ["all"]:
        args.magnification = list(BREAKHIS.magnifications)
    if args.folds == ["all"]:
        args.folds = list(range(args.num_folds))
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what no single flag shows to be wrong."""
    if (args.data_dir is None) == (not args.synthetic):
        parser.error("one of the arguments --data-dir and --synthetic is required, and not both")
    if args.data_dir is not None and not args.download and not args.data_dir.is_dir():
        parser.error(f"argument --data-dir: must be a directory, got {str(args.data_dir)!r}")
    if (args.download or args.synthetic) and args.dataset != "breakhis":
        parser.error(f"argument --dataset: must be 'breakhis' to be downloaded or drawn, got {args.dataset!r}")
    if args.download and args.synthetic:
        parser.error("argument --download: not allowed with argument --synthetic")
    if args.task not in SOURCES[args.dataset].classes:
        parser.error(f"argument --task: must be {', '.join(SOURCES[args.dataset].classes)}, got {args.task!r}")
    if args.magnification not in (None, ["pooled"]) and not SOURCES[args.dataset].magnifications:
        parser.error(
            f"argument --magnification: must be pooled with --dataset {args.dataset}, got {args.magnification}"
        )
    for flag in ("magnification", "folds", "seeds"):
        values = getattr(args, flag) or []
        if len(set(values)) < len(values) or (len(values) > 1 and {"all", "pooled"} & set(values)):
            parser.error(f"argument --{flag}: must name each once, and all or pooled alone, got {values}")
    inside = args.data_dir is not None and args.output_dir.resolve().is_relative_to(args.data_dir.resolve())
    if inside:
        parser.error(
            "argument --output-dir: must not lie in --data-dir, where its figures would be taken for images, "
            f"got {str(args.output_dir)!r}"
        )
    if args.protocol == "image" and args.group_by != "patient":
        parser.error(f"argument --group-by: not allowed with --protocol image, got {args.group_by!r}")
    if args.protocol == "official":
        if args.num_folds != 5:
            parser.error(f"argument --num-folds: must be 5 with --protocol official, got {args.num_folds}")
        if args.dataset != "breakhis" or args.synthetic:
            parser.error("argument --protocol: 'official' lists the images of BreakHis alone")
        if args.fold_dir is None or not args.fold_dir.is_dir():
            parser.error(f"argument --fold-dir: must be a directory with dsfold1.txt, got {str(args.fold_dir)!r}")
    for fold in args.folds:
        if fold != "all" and fold >= args.num_folds:
            parser.error(f"argument --folds: must be below --num-folds {args.num_folds}, got {fold}")
    if not timm.is_model(args.model):
        parser.error(f"argument --model: must be a model that timm knows, got {args.model!r}")
    if args.ablation and not args.model.startswith("kfde_"):
        parser.error(f"argument --ablation: needs a model that starts with kfde_, got --model {args.model}")
    if args.ablation and args.variants:
        parser.error("argument --variants: not allowed with argument --ablation, which is four variants")
    for name, kwargs in args.variants.items():
        if not isinstance(name, str) or not _VARIANT.fullmatch(name) or not isinstance(kwargs, dict | None):
            parser.error(
                "argument --variants: must map names of letters, digits and .+-_ to mappings of model arguments, "
                f"got {name!r}: {kwargs!r}"
            )
    if args.pretrained and args.checkpoint_path is not None:
        parser.error("argument --checkpoint-path: not allowed with argument --pretrained")
    if args.checkpoint_path is not None and not args.checkpoint_path.is_file():
        parser.error(f"argument --checkpoint-path: must be a file, got {str(args.checkpoint_path)!r}")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"argument --batch-size: must be even with --mixup or --cutmix, got {args.batch_size}")


def expand(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The runs that the flags ask for: every variant at every magnification, on every fold, from every seed.

    Each is the flags again with `variant`, `fold` and `seed` in place of the lists, one magnification, and a directory
    of its own below `output_dir`; a single run has `output_dir` to itself.
    """
    variants = ABLATION if args.ablation else args.variants or {args.model: {}}
    points = list(itertools.product(variants, args.magnification, args.folds, args.seeds))
    runs = []
    for variant, magnification, fold, seed in points:
        run = argparse.Namespace(**vars(args))
        for plural in ("folds", "seeds", "variants", "ablation"):
            delattr(run, plural)
        run.variant, run.magnification, run.fold, run.seed = variant, magnification, fold, seed
        run.model_kwargs = {**args.model_kwargs, **(variants[variant] or {})}
        if len(points) > 1:
            run.output_dir = args.output_dir / "runs" / f"{variant}-{magnification}-fold{fold}-seed{seed}"
        runs.append(run)
    return runs


def recorded(run: argparse.Namespace) -> dict[str, Any]:
    """A run's flags as a mapping that `--config` takes to repeat it."""
    flags = {key: str(value.resolve()) if isinstance(value, Path) else value for key, value in vars(run).items()}
    del flags["config"], flags["output_dir"], flags["resume"], flags["variant"]
    flags["folds"], flags["seeds"] = [flags.pop("fold")], [flags.pop("seed")]
    return flags | {"magnification": [run.magnification]}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed run would do otherwise, in words such as "lr was 0.1, now 0.2"."""
    keys = [key for key in {**before, **now} if key not in _MACHINE]
    return [f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)]
