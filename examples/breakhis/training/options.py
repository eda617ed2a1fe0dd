"""The flags of the trainer, on the command line or in a YAML file, and the runs that they ask for."""

import argparse
import itertools
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from breakhis.data.hashes import hash_files
from breakhis.data.sources import BREAKHIS, SOURCES
from breakhis.files import real_path
from breakhis.mappings import read_yaml
from breakhis.training.argument_types import Parser, as_argv, path
from breakhis.training.flags import make_parser
from breakhis.training.variants import resolve_variants

# Flags that a resumed run may change: they affect no result. Its images are compared separately.
_FREE_FLAGS = ("num_workers", "data_dir", "fold_dir", "download", "archive_sha256", "checkpoint_path")
_FREE_FLAGS += ("question", "primary_score", "margin")
# Arguments of timm by which a model could get other inputs and outputs, or weights that nobody has checked.
_OWN_ARGUMENTS = {"num_classes", "in_chans", "features_only", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
_OWN_ARGUMENTS |= {"checkpoint_path", "cache_dir"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and the YAML file that it may name.

    Args:
        argv: The command line; None: that of the process.

    Returns:
        The flags, with "all" resolved.

    Raises:
        SystemExit: A flag is wrong; the message says which one and why.
    """
    parser = make_parser()
    config_parser = Parser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", type=path)
    known, rest = config_parser.parse_known_args(argv)
    if known.config is not None:
        try:
            config = read_yaml(known.config)
        except (OSError, ValueError) as error:
            parser.error(f"argument --config: must be a YAML file that can be read, got {error}")
        if "config" in config:
            parser.error(f"argument --config: must be a mapping from flags to values without config, got {config!r}")
        rest = ["--config", str(known.config), *as_argv(config), *rest]
    args = parser.parse_args(rest)
    _check(parser, args)
    args.variants = resolve_variants(parser, args)
    models = {name: argparse.Namespace(**vars(args) | changed) for name, changed in args.variants.items()}
    for name, model in models.items():
        _check_model(parser, model)
        _check_recipe(parser, model)
        args.variants[name]["checkpoint_sha256"] = model.checkpoint_sha256
    _check_same_images(parser, models)
    if args.identity_start is not None and not any(m.insert or m.model.startswith("kfde_") for m in models.values()):
        parser.error("argument --identity-start: not allowed without blocks, by --insert or in a kfde_* model")
    if args.magnification is None:
        args.magnification = ["100X"] if SOURCES[args.dataset].magnifications else ["pooled"]
    if args.magnification == ["all"]:
        args.magnification = list(BREAKHIS.magnifications)
    if args.folds == ["all"]:
        args.folds = list(range(args.num_folds))
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse contradicting flags."""
    if args.resume and args.overwrite:
        parser.error("argument --overwrite: not allowed with argument --resume, which keeps what --overwrite replaces")
    _check_data(parser, args)
    _check_protocol(parser, args)


def _check_data(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.data_dir is None) == (not args.synthetic):
        parser.error("one of the arguments --data-dir and --synthetic is required, and not both")
    if args.data_dir is not None and not args.download and not args.data_dir.is_dir():
        parser.error(f"argument --data-dir: must be a directory, got {str(args.data_dir)!r}")
    if (args.download or args.synthetic) and args.dataset != "breakhis":
        parser.error(f"argument --dataset: must be 'breakhis' to be downloaded or drawn, got {args.dataset!r}")
    if args.download and args.synthetic:
        parser.error("argument --download: not allowed with argument --synthetic")
    if args.archive_sha256 is not None and not args.download:
        parser.error("argument --archive-sha256: not allowed without argument --download")
    if args.task not in SOURCES[args.dataset].classes:
        parser.error(f"argument --task: must be {', '.join(SOURCES[args.dataset].classes)}, got {args.task!r}")
    if args.magnification not in (None, ["pooled"]) and not SOURCES[args.dataset].magnifications:
        parser.error(
            f"argument --magnification: must be pooled with --dataset {args.dataset}, got {args.magnification}"
        )
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"argument --output-dir: must be a directory, got the file {str(args.output_dir)!r}")
    if args.data_dir is not None and real_path(args.output_dir).is_relative_to(real_path(args.data_dir)):
        parser.error(
            "argument --output-dir: must not lie in --data-dir, where its figures would be taken for images, "
            f"got {str(args.output_dir)!r}"
        )


def _check_protocol(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for flag in ("magnification", "folds", "seeds"):
        values = getattr(args, flag) or []
        if len(set(values)) < len(values) or (len(values) > 1 and {"all", "pooled"} & set(values)):
            parser.error(f"argument --{flag}: must name each once, and all or pooled alone, got {values}")
    if args.protocol == "image" and args.group_by != "case":
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


def _check_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check the model of one variant."""
    # Late: these take seconds, and most wrong flags are found without them.
    import timm

    import breakhis.baselines  # noqa: F401
    import kfde_layers  # noqa: F401

    if not timm.is_model(args.model):
        meant = get_close_matches(args.model, timm.list_models(), n=1)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        parser.error(f"argument --model: must be a model that timm knows, got {args.model!r}{hint}")
    if own := sorted(_OWN_ARGUMENTS & set(map(str, args.model_kwargs))):
        parser.error(
            f"argument --model-kwargs or --variants: must not have {own[0]}, which this script sets itself, got "
            f"{args.model_kwargs}"
        )
    _check_start(parser, args)


def _check_recipe(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check the recipe of one variant."""
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"argument --batch-size: must be even with --mixup or --cutmix, got {args.batch_size}")
    if args.min_lr > args.lr:
        parser.error(f"argument --min-lr: must be at most --lr {args.lr}, got {args.min_lr}")
    if args.gauss_error is not None and not args.gauss_error[0] < 0 < args.gauss_error[1]:
        parser.error(f"argument --gauss-error: must be a number below 0 and one above it, got {args.gauss_error}")
    if args.tested_cases != "whole" and (args.protocol, args.group_by) != ("patient", "case"):
        parser.error(
            f"argument --tested-cases: must be whole unless --protocol patient divides cases, got {args.tested_cases!r}"
        )
    if args.tested_cases != "whole" and args.score_on == "val":
        parser.error(f"argument --tested-cases: must be whole with --score-on val, got {args.tested_cases!r}")


def _check_same_images(parser: argparse.ArgumentParser, models: dict[str, argparse.Namespace]) -> None:
    """Refuse variants that would be tested on other images than the first, with which they are compared."""
    whole = {name: model.tested_cases == "whole" for name, model in models.items()}
    if len(set(whole.values())) > 1:
        first = next(iter(whole))
        other = next(name for name in whole if whole[name] != whole[first])
        parser.error(
            "argument --tested-cases: must be whole for all variants or for none, so that they test the same images, "
            f"got {models[first].tested_cases!r} for {first} and {models[other].tested_cases!r} for {other}"
        )


def _check_start(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check the file of weights, and make its content a flag: another file under the same name starts another run."""
    path, wanted = args.checkpoint_path, args.checkpoint_sha256
    if path is None:
        if wanted is not None:
            parser.error("argument --checkpoint-sha256: not allowed without argument --checkpoint-path")
        return
    if args.pretrained:
        parser.error("argument --checkpoint-path: not allowed with argument --pretrained")
    if not path.is_file():
        parser.error(f"argument --checkpoint-path: must be a file, got {str(path)!r}")
    args.checkpoint_sha256 = hash_files([path])[path]
    if wanted not in (None, args.checkpoint_sha256):
        parser.error(
            f"argument --checkpoint-path: must be the file with --checkpoint-sha256 {wanted}, got {str(path)!r} with "
            f"{args.checkpoint_sha256}"
        )


def expand(args: argparse.Namespace) -> list[argparse.Namespace]:
    """List the runs that the flags ask for: every variant at every magnification, on every fold, from every seed.

    A run has all flags, but with `variant`, `fold` and `seed` instead of the lists, one magnification, and its own
    directory below `output_dir`. A single run writes into `output_dir` itself.
    """
    points = list(itertools.product(args.variants, args.magnification, args.folds, args.seeds))
    runs = []
    for variant, magnification, fold, seed in points:
        run = argparse.Namespace(**vars(args) | args.variants[variant])
        for plural in ("folds", "seeds", "variants", "ablation"):
            delattr(run, plural)
        run.variant, run.magnification, run.fold, run.seed = variant, magnification, fold, seed
        if len(points) > 1:
            run.output_dir = args.output_dir / "runs" / f"{variant}-{magnification}-fold{fold}-seed{seed}"
        runs.append(run)
    return runs


def recorded(run: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of a run as a mapping from which `--config` repeats it."""
    flags = {key: str(real_path(value)) if isinstance(value, Path) else value for key, value in vars(run).items()}
    for name in (
        "config",
        "output_dir",
        "resume",
        "overwrite",
        "shard",
        "variant",
    ):  # not of the run itself, or in other flags
        del flags[name]
    flags["folds"], flags["seeds"] = [flags.pop("fold")], [flags.pop("seed")]
    return flags | {"magnification": [run.magnification]}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the changed flags that could change the results of a resumed run, such as "lr was 0.1, now 0.2"."""
    keys = [key for key in {**before, **now} if key not in _FREE_FLAGS and before.get(key) != now.get(key)]
    names = {"checkpoint_sha256": f"checkpoint_sha256 of {now.get('checkpoint_path')}"}
    return [f"{names.get(key, key)} was {before.get(key)!r}, now {now.get(key)!r}" for key in keys]
