"""Put blocks after the modules of a network, and take them out again."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from kfde_layers._checks import check_bool, check_instance, check_mapping
from kfde_layers.insertion.adapters import ChannelsFirst, Grid, Item, Tokens
from kfde_layers.insertion.dry_run import (
    Noise,
    check_block,
    check_order,
    check_training,
    outputs_of,
    runs_children,
)
from kfde_layers.insertion.effects import Tap, have_effects
from kfde_layers.insertion.joining import holds_block, join, leave
from kfde_layers.insertion.making import Block, make_block
from kfde_layers.insertion.merging import check_merging
from kfde_layers.insertion.points import Seen, probe
from kfde_layers.insertion.running import Trial, check_unwrapped, example_for
from kfde_layers.layers import Blend

Model = TypeVar("Model", bound=nn.Module)


def insert(
    model: Model,
    blocks: Mapping[str, Block],
    *,
    example_input: Tensor | None = None,
    identity_start: bool = False,
) -> Model:
    """Put a block after each named module, in place.

    The block becomes part of that module, so that the model's own API (`forward_intermediates`, `reset_classifier` and
    the like) works as before and includes the block. Every old key of the state dict keeps its name, and a checkpoint
    of the model without blocks loads with `strict=False`: only the keys of the blocks are missing. Blocks see maps
    (N, C, H, W) whatever the module returns. Tokens (N, L, C) are laid out in rows, and prefix tokens bypass the block.
    Of several tensors, the first that is a feature map goes through the block.

    Args:
        model: Changed in place.
        blocks: For each module name, a module, or a function that makes one from a number of channels, such as the
            class `CSFE` or `functools.partial(MFDF, kernel_sizes=(3, 5))`. A file of settings can hold the name of a
            layer, `"CSFE"`, or a pair of name and options, `["MFDF", {"kernel_sizes": [3, 5]}]`, or the same as a dict,
            `{"MFDF": {"kernel_sizes": [3, 5]}}`. "SimAM" and the attention layers of timm, such as "se", have names
            too; upper case is lower case. A list of blocks is a block that runs them one after the other.
            `insertion_points(model)` names the usual places. Any submodule is possible that returns a feature map and
            is called once.
        example_input: As in `insertion_points`.
        identity_start: Whether each block starts as the identity (`kfde_layers.layers.Blend`), so that the outputs of
            a pretrained model do not change before training.

    Returns:
        The same model.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The model is compiled or wrapped for several devices; a name is no submodule, or its module is not
            called once (in training too), returns no feature map, returns values that are not finite or already holds a
            block; or the block cannot be made, shares a module with the model or with another block, does not run on
            the map, does not keep its shape and dtype, or passes no gradient. The model is then unchanged.

    Warns:
        UserWarning: The model's output does not depend on the map that the block changes. An example is the last block
            of a transformer that classifies by its class token alone. The inserted block then changes only the features
            that are read there, and the output gives it no gradient.

    Examples:
        >>> from kfde_layers import CSFE
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
        >>> sorted(insert(model, {"1": CSFE}).state_dict())
        ['0.bias', '0.weight', '1.kfde.cfe.bias', '1.kfde.cfe.weight']
    """
    check_unwrapped(model)
    check_mapping("blocks", blocks, "from module names to blocks")
    for name in blocks:
        check_instance("each key of blocks", name, str)
    check_bool("identity_start", identity_start)
    trial = Trial(model, example_for(model, example_input))
    insertions = _prepare(trial, blocks, identity_start)
    noises = {insertion.name: _adapted(Noise(), insertion.seen) for insertion in insertions}
    taps = {insertion.name: _adapted(Tap(), insertion.seen) for insertion in insertions}
    seen_at = {insertion.name: insertion.seen for insertion in insertions}
    plain = outputs_of(trial, seen_at)
    check_order(trial, seen_at, plain)
    check_training(trial, seen_at)
    is_run = runs_children(trial, noises, plain)
    check_merging(trial, noises, {insertion.name: insertion.seen.key for insertion in insertions}, is_run)
    has_effect = have_effects(trial, taps, noises)
    for insertion in insertions:
        if not has_effect[insertion.name]:
            warnings.warn(
                f"the model's output does not depend on the feature map at {insertion.name!r}: the block there will "
                "not change it, and gets no gradient from it",
                stacklevel=2,
            )
    for insertion in insertions:
        _attach(insertion, is_run[insertion.name])
    return model


def remove(model: Model, names: Iterable[str] | None = None) -> Model:
    """Take out blocks that `insert` has put in, in place.

    Args:
        model: Changed in place.
        names: Names of the modules that lose their blocks. None takes out all blocks.

    Returns:
        The same model, as it was before `insert`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The model is compiled, scripted or wrapped, or a name is no submodule into which a block was
            inserted. The model is then unchanged.

    Examples:
        >>> from kfde_layers import CSFE, insert
        >>> model = insert(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), {"1": CSFE})
        >>> sorted(remove(model).state_dict())
        ['0.bias', '0.weight']
    """
    check_unwrapped(model)
    if isinstance(names, str):
        raise TypeError(f"names must be a list of module names, got the string {names!r}: did you mean [{names!r}]?")
    if names is not None and not isinstance(names, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"names must be a list of module names or None, got {names!r} of type {type(names).__name__}")
    holders = {name: module for name, module in model.named_modules(remove_duplicate=False) if holds_block(module)}
    chosen = holders if names is None else dict.fromkeys(names)
    for name in chosen:
        if name not in holders:
            wanted = ", ".join(map(repr, holders)) or "none in this model"
            raise ValueError(f"names must be modules into which a block was inserted ({wanted}), got {name!r}")
    for module in {holders[name]: None for name in chosen}:
        leave(module)
    return model


class _Insertion(NamedTuple):
    """A block that is ready to join a module."""

    name: str
    """Name of the module."""
    module: nn.Module
    """The module."""
    seen: Seen
    """Map that the module returned for the example."""
    block: nn.Module
    """The block, adapted to the module's output."""
    patch_embed: nn.Module | None
    """The module that says how each image was cut, where the model takes images of any size."""


def _prepare(trial: Trial, blocks: Mapping[str, Block], identity_start: bool) -> list[_Insertion]:
    """Make the blocks and try them; leave the model unchanged."""
    patch_embeds = {name: _patch_embed_of(trial.model, name) for name in blocks if name}
    cuts = _cuts_in(trial, patch_embeds.values())
    seen_at = probe(trial, blocks)
    insertions: list[_Insertion] = []
    owners = dict.fromkeys(trial.model.modules(), "the model")
    for name, block in blocks.items():
        seen = seen_at[name]
        if isinstance(seen, str):
            raise ValueError(f"cannot insert at {name!r}: {seen}")
        module = trial.model.get_submodule(name)
        for insertion in insertions:
            if insertion.module is module:
                raise ValueError(f"cannot insert at {name!r}: it is the same module as {insertion.name!r}")
        if not seen.output.is_meta and not seen.output.isfinite().all():
            raise ValueError(
                f"cannot insert at {name!r}: its map has values that are not finite, for this example and these weights"
            )
        channels = seen.point.channels
        new = make_block(name, block, channels, seen.output.device)
        label = f"the block at {name!r}"
        for part in new.modules():
            if (owner := owners.setdefault(part, label)) != label:
                raise ValueError(f"{label} must share no module with {owner}, got a {type(part).__name__} of both")
        check_block(name, new, seen)
        if identity_start:
            new = Blend(new, channels, device=seen.output.device)
        patch_embed = patch_embeds[name]
        if patch_embed is not None and cuts.get(patch_embed) != seen.map_size:
            patch_embed = None  # it does not say the grid of this map
        last_grid = None if patch_embed is None else Grid(seen.map_size)
        insertions.append(_Insertion(name, module, seen, _adapted(new, seen, last_grid), patch_embed))
    return insertions


def _attach(insertion: _Insertion, is_run: bool) -> None:
    """Have the block join its module, on the device and in the dtype and mode of the module."""
    module, output = insertion.module, insertion.seen.output
    block = insertion.block.to(output.device, output.dtype).train(module.training)
    join(module, block, insertion.seen.key, is_run, insertion.patch_embed)


def _patch_embed_of(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module that cuts images of any size into patches for the module `name`, if there is one.

    It belongs to the nearest module around `name` that declares that it takes such images.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    while name:
        name = name.rpartition(".")[0]
        around = modules.get(name)
        patch_embed = getattr(around, "patch_embed", None)
        if getattr(around, "dynamic_img_size", False) and isinstance(patch_embed, nn.Module):
            return patch_embed
    return None


def _cuts_in(trial: Trial, patch_embeds: Iterable[nn.Module | None]) -> dict[nn.Module, tuple[int, int]]:
    """Return into how many rows and columns each module cuts the example, if it returns (N, H, W, C)."""
    cuts: dict[nn.Module, tuple[int, int]] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            cuts[module] = (output.shape[1], output.shape[2])

    hooks = [(module, hook) for module in dict.fromkeys(patch_embeds) if module is not None]
    if hooks:
        trial.run(hooks)
    return cuts


def _adapted(block: nn.Module, seen: Seen, last_grid: Grid | None = None) -> nn.Module:
    """Wrap the block so that it takes the module's output."""
    if seen.point.layout == "NHWC":
        block = ChannelsFirst(block)
    elif seen.point.layout == "NLC":
        block = Tokens(block, seen.map_size, seen.point.num_prefix_tokens, last_grid)
    return block if seen.key is None else Item(block, seen.key)
