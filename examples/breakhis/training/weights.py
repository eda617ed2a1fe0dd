"""Read weights from files, and put them into models so that every name of the file and of the model is accounted for.

timm loads a file leniently as soon as its classifier has another size: a file that fits nothing then leaves the model
at random weights. So what timm loads is compared here.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from breakhis.names import printable
from breakhis.training.finite import check_weights

logger = logging.getLogger(__name__)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint in any layout that timm knows: safetensors or torch, plain or below "state_dict" or "model".

    Reading never runs code that the file contains.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It cannot be read, holds something else than tensors by name, or weights that are not finite.
    """
    path.open("rb").close()  # an error of the file system needs no translation
    try:
        weights = load_state_dict(str(path), device="cpu")
    except Exception as error:  # for a damaged file, torch and safetensors raise a dozen types
        raise ValueError(f"{path} must be a checkpoint of weights, got {reason(error)}") from error
    strange = [f"{key!r}: {_kind(value)}" for key, value in weights.items() if _kind(value) != "tensor"]
    if strange or not weights:
        got = strange[0] if strange else "no tensor"
        raise ValueError(f"{path} must be a checkpoint that maps names to plain tensors, got {got}")
    check_weights(weights, path)
    return weights


def _kind(value: Any) -> str:
    """Name what a checkpoint holds; "tensor" is a dense one of real numbers."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    plain = value.layout == torch.strided and not value.is_quantized and not value.is_complex() and not value.is_meta
    return "tensor" if plain else f"tensor of {value.dtype} on {value.device}, {value.layout}"


def reason(error: Exception) -> str:
    """Return the first sentence of an error about a damaged file; further ones advise torch's own users."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first.partition('. ')[0]}".removesuffix(": ")


def load_exactly(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Put all weights of a file into a model that needs exactly these.

    Raises:
        ValueError: A tensor is missing, left over, of another shape, or of integers instead of floating-point numbers.
    """
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own if key not in weights]
    problems += [f"{key} is left over" for key in weights if key not in own]
    problems += [
        f"{key} must be of shape {tuple(own[key].shape)}, got {tuple(tensor.shape)}"
        for key, tensor in weights.items()
        if key in own and own[key].shape != tensor.shape
    ]
    problems += _miscast(own, weights)
    if problems:
        raise ValueError(f"{path} must hold the weights of its config.json's model exactly: {_some(problems)}")
    model.load_state_dict(weights)


class Loaded(NamedTuple):
    """What one call of `load_state_dict` did."""

    model: nn.Module
    """The model that was filled."""
    missing: list[str]
    """Names that the model has and the file has not."""
    unexpected: list[str]
    """Names that the file has and the model has not."""
    miscast: list[str]
    """What holds integers instead of floating-point numbers, or the reverse; torch would round without a word."""


@contextmanager
def record_loads() -> Iterator[list[Loaded]]:
    """Record what each `load_state_dict` in the block fills: timm only logs it, and its conversions are its own."""
    loads: list[Loaded] = []
    original = nn.Module.load_state_dict

    def record(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = original(module, state_dict, *args, **kwargs)
        miscast = _miscast(module.state_dict(), state_dict)
        loads.append(Loaded(module, list(result.missing_keys), list(result.unexpected_keys), miscast))
        return result

    nn.Module.load_state_dict = record
    try:
        yield loads
    finally:
        nn.Module.load_state_dict = original


def check_start(model: nn.Module, loads: list[Loaded], path: Path) -> None:
    """Check that a file, which timm has converted and loaded, filled all of a model except its classifier.

    The classifier starts at random where timm does not load it, which is so for every number of classes but that of the
    weights that timm knows, and where the file has none; the log says so. The file may also hold
    counts of batches, and buffers that timm computes instead of saving, such as the index of relative positions.

    Args:
        model: The model that `timm.create_model` returned.
        loads: What `record_loads` recorded meanwhile.
        path: The file, for the message.

    Raises:
        ValueError: Another part of the model is not filled, or the file holds more than the model needs.
    """
    fills = [load for load in loads if load.model is model]
    if len(fills) != 1:
        raise ValueError(f"{path} must be loaded once by timm, got {len(fills)} times")
    heads = _head_names(model)
    inside = {key for key in model.state_dict() if key.partition(".")[0] in {name.partition(".")[0] for name in heads}}
    may_miss = {f"{name}.{part}" for name in heads for part in ("weight", "bias")}
    if inside <= set(fills[0].missing):  # a self-supervised file has no head at all, so also no norm in it
        may_miss |= inside
    computed = dict(model.named_buffers()).keys() - model.state_dict().keys()
    problems = [f"{key} is missing" for key in fills[0].missing if key not in may_miss]
    problems += [
        f"{key} is left over"
        for key in fills[0].unexpected
        if key not in computed and not key.endswith(".num_batches_tracked")  # a count that changes no output
    ]
    problems += fills[0].miscast
    if problems:
        raise ValueError(f"{path} must hold weights of all of the model except the classifier: {_some(problems)}")
    if fills[0].missing:
        logger.info("not loaded from %s, so these start at random: %s", printable(path), ", ".join(fills[0].missing))


def _miscast(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Describe the tensors of a file with integers for floating-point numbers, or the reverse."""
    return [
        f"{key} must be of {own[key].dtype}, got {tensor.dtype}"
        for key, tensor in weights.items()
        if key in own and own[key].is_floating_point() != tensor.is_floating_point()
    ]


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's classifiers; some models have two."""
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _some(problems: list[str]) -> str:
    """Join the first problems, and count the others."""
    further = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"{', '.join(problems[:3])}{further}"
