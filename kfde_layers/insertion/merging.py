"""Whether blocks stay in a model that merges its modules for inference, as RepVGG, LeViT and YOLO do."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from kfde_layers.insertion.adapters import Key
from kfde_layers.insertion.dry_run import Noise, close, part_of, tensors_in
from kfde_layers.insertion.joining import join
from kfde_layers.insertion.running import Trial

_METHODS = ("fuse", "reparameterize", "switch_to_deploy")  # those that timm's `reparameterize_model` calls


def check_merging(
    trial: Trial, noises: Mapping[str, nn.Module], keys: Mapping[str, Key | None], is_run: Mapping[str, bool]
) -> None:
    """Refuse a module that would lose its block, or whose merged form gives other numbers with it.

    Args:
        trial: The model, unchanged afterwards.
        noises: For each name, a `Noise` for the module's output, which stands for the block.
        keys: For each name, the key of the map in the module's output.
        is_run: For each name, whether the module runs a new child.

    Raises:
        ValueError: A block would not stay; the message names its module.
    """
    if not any(hasattr(module, method) for module in trial.model.modules() for method in _METHODS):
        return

    def is_kept(names: Iterable[str]) -> bool:
        return _is_kept(trial, {name: noises[name] for name in names}, keys, is_run)

    if is_kept(noises) or not is_kept(()):  # without a block, the model may not be mergeable either
        return
    for name in noises:
        if not is_kept([name]):
            raise ValueError(
                f"cannot insert at {name!r}: the model merges this module into another one for inference, without the "
                "block; insert after the module that holds it, or merge first (timm.utils.model.reparameterize_model, "
                "or the model's own fuse), then insert"
            )


def _is_kept(
    trial: Trial, noises: Mapping[str, nn.Module], keys: Mapping[str, Key | None], is_run: Mapping[str, bool]
) -> bool:
    """Return whether a copy of the model with blocks, once merged, still runs them and gives the same output."""
    try:
        # in 16 bits a merged model would differ from itself
        dtype = torch.promote_types(trial.example.dtype, torch.float32)
        copied, example = copy.deepcopy(trial.model).eval().to(dtype), trial.example.to(dtype)
        _scale_norms(copied)
        blocks = {name: copy.deepcopy(noise) for name, noise in noises.items()}
        for name, block in blocks.items():
            join(copied.get_submodule(name), block, keys[name], is_run[name])
        before = tensors_in(Trial(copied, example).run())
        counters = [part_of(block, Noise).calls for block in blocks.values()]
        for counter in counters:
            counter.clear()
        _merge(copied)
        after = tensors_in(Trial(copied, example).run())
    except Exception:  # of the model's own code, which can fail in any way
        return False
    return all(counters) and close(before, after)


def _scale_norms(model: nn.Module) -> None:
    """Change the variances of batch norms in place. A new norm changes nothing, and could be merged anywhere."""
    for module in model.modules():
        variance = getattr(module, "running_var", None)
        if isinstance(variance, Tensor):
            variance.mul_(torch.linspace(0.5, 2, len(variance), dtype=variance.dtype, device=variance.device))


def _merge(model: nn.Module) -> None:
    """Merge the modules of a model, in place."""
    fuse: Any = getattr(model, "fuse", None)
    if fuse is None or isinstance(fuse, nn.Module):  # a part may have this name
        reparameterize_model(model, inplace=True)
        return
    # Ultralytics' models merge their modules from outside, and say so unless told not to
    fuse(**({"verbose": False} if "verbose" in inspect.signature(fuse).parameters else {}))
