"""The variants of a study: what each changes in the flags of the model and the recipe."""

import argparse
import re
from difflib import get_close_matches
from typing import Any

from breakhis.training.argument_types import as_argv
from breakhis.training.flags import ABLATION, make_variant_parser

_NAME = re.compile(r"[\w.+-]+")  # a variant is the name of a folder


def resolve_variants(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the flags that each variant changes; there is one, named by the model, if no other is asked for.

    An argument of a variant that is a flag of the model or of the recipe is that flag. Any other one is an argument of
    the model.

    Args:
        parser: Reports what is wrong.
        args: The flags of all variants.
    """
    if args.ablation:
        if args.variants:
            parser.error("argument --variants: not allowed with argument --ablation, which makes its own")
        variants = _ablation(parser, args)
    else:
        variants = args.variants or {args.model: {}}
    flags = make_variant_parser(parser.error)
    names = vars(flags.parse_args([])).keys()
    resolved = {}
    for name, variant in variants.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(variant, dict | None):
            parser.error(
                "argument --variants: must map names of letters, digits and .+-_ to mappings of flags and model "
                f"arguments, got {name!r}: {variant!r}"
            )
        arguments = {str(key).replace("-", "_"): value for key, value in (variant or {}).items()}
        own = {key: value for key, value in arguments.items() if key in names}
        others = {key: value for key, value in arguments.items() if key not in names}
        _check_names(parser, name, own, others, vars(flags.parse_args([])))
        changed = {key: value for key, value in vars(flags.parse_args(as_argv(own))).items() if key in own}
        resolved[name] = changed | {"model_kwargs": args.model_kwargs | others}
    return resolved


def _check_names(
    parser: argparse.ArgumentParser, name: str, own: dict[str, Any], others: dict[str, Any], defaults: dict[str, Any]
) -> None:
    """Refuse flags that all variants share, and an empty value of a flag that needs one."""
    shared = {action.dest for action in parser._actions} | {"seed", "fold"}  # pyright: ignore[reportPrivateUsage]
    for key in others:
        if key in shared:
            parser.error(f"argument --variants: must have flags of the model and the recipe, got {key} in {name}")
        if meant := get_close_matches(key, defaults, n=1, cutoff=0.85):
            parser.error(f"argument --variants: must have known flags, got {key} in {name}; did you mean {meant[0]}?")
    for key, value in own.items():
        if value is None and defaults[key] is not None:
            parser.error(f"argument --variants: must give a value to {key} in {name}, got none")


def _ablation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    if args.model.startswith("kfde_") and not args.insert:
        return ABLATION
    from breakhis.training.blocks import ablate, kfde_at_the_end  # late: it makes models

    try:
        return ablate(args.insert or kfde_at_the_end(args.model))
    except (RuntimeError, TypeError, ValueError) as error:
        parser.error(f"argument --ablation: {error}")
