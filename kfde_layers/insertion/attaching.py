"""Put blocks behind the modules of a network, and take them out again."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from kfde_layers._checks import check_bool, check_instance, check_mapping
from kfde_layers.insertion.adapters import ChannelsFirst, Item, Tokens
from kfde_layers.insertion.probing import CHILD, Found, check_unwrapped, example_for, probe
from kfde_layers.insertion.trying import Noise, check_block, effects, runs_a_child
from kfde_layers.layers import Blend

Model = TypeVar("Model", bound=nn.Module)

# marks a module behind which `insert` has put a block: a block of another's making can bear the same name, as in the
# stages of this package's own models
_INSERTED = f"{CHILD}_inserted"


def insert(
    model: Model,
    blocks: Mapping[str, nn.Module | Callable[[int], nn.Module]],
    *,
    example_input: Tensor | None = None,
    identity_start: bool = False,
) -> Model:
    """Put a block behind each named module, in place.

    The block becomes part of the module it stands behind, so that the model's own API (`forward_intermediates`,
    `reset_classifier` and the like) goes on as before and passes through it. Every old key of the state dict keeps
    its name, and a checkpoint of the bare model loads with `strict=False`, the block's keys alone missing. Blocks see
    maps (N, C, H, W) whatever the module returns: of tokens (N, L, C), those behind the prefix tokens are laid out in
    rows; of several tensors, the first that is a feature map goes through the block.

    Args:
        model: Changed in place.
        blocks: For each module name, a module, or what makes one from a number of channels, such as the class `CSFE`
            or `functools.partial(MFDF, kernel_sizes=(3, 5))`. `insertion_points(model)` names the usual places; any
            submodule will do that returns a feature map and is called once.
        example_input: As in `insertion_points`.
        identity_start: Whether each block is blended in from nothing (`kfde_layers.layers.Blend`), so that a
            pretrained model's outputs stay at first what they were.

    Returns:
        The same model.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The model is compiled or wrapped for several devices; a name is no submodule, or its module is not
            called once, returns no feature map or already holds a block; or the block does not run on the map or does
            not keep its shape. The model is then unchanged.

    Warns:
        UserWarning: The model's output does not depend on what the block changes, as behind the last block of a
            transformer that classifies by its class token alone. The block then only serves those who read features
            there, and the output gives it no gradient.

    Examples:
        >>> from kfde_layers import CSFE
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
        >>> sorted(insert(model, {"1": CSFE}).state_dict())
        ['0.bias', '0.weight', '1.kfde.cfe.bias', '1.kfde.cfe.weight']
    """
    check_unwrapped(model)
    check_mapping("blocks", blocks, "from module names to blocks")
    for name in blocks:
        check_instance("a name in blocks", name, str)
    check_bool("identity_start", identity_start)
    example = example_for(model, example_input)
    found = probe(model, blocks, example)
    modules: dict[nn.Module, str] = {}
    prepared: list[tuple[nn.Module, Found, nn.Module, bool]] = []
    for name, block in blocks.items():
        at = found[name]
        if isinstance(at, str):
            raise ValueError(f"cannot insert at {name!r}: {at}")
        module = model.get_submodule(name)
        if module in modules:
            raise ValueError(f"cannot insert at {name!r}: it is one module with another of the names")
        modules[module] = name
        new = block(at.point.channels) if callable(block) and not isinstance(block, nn.Module) else block
        if not isinstance(new, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the block at {name!r} must be a module or make one of a number of channels, got {new!r}")
        check_block(name, new, at)
        if identity_start:
            new = Blend(new, at.point.channels)
        prepared.append((module, at, _adapted(new, at), runs_a_child(model, example, name, _adapted(Noise(), at))))

    for module, has_effect in effects(model, example, {m: _adapted(Noise(), at) for m, at, _, _ in prepared}).items():
        if not has_effect:
            warnings.warn(
                f"the model's output does not depend, as it stands, on the feature map at {modules[module]!r}: the "
                "block there will not change it, and gets no gradient from it",
                stacklevel=2,
            )
    for module, at, block, is_run in prepared:
        module.add_module(CHILD, block.to(at.output.device, at.output.dtype).train(module.training))
        hook = _run_child if at.key is None else _run_child_of_any
        # Before other hooks, so that those see the block's output. The handle stays with the module, for when both are
        # copied or pickled: only a handle that is unpickled tells torch that the number of its hook is taken.
        module.__dict__[_INSERTED] = None if is_run else module.register_forward_hook(hook, prepend=True)
    return model


def remove(model: Model, names: Iterable[str] | None = None) -> Model:
    """Take blocks out that `insert` has put in, in place.

    Args:
        model: Changed in place.
        names: The modules behind which the blocks stand. None takes out all.

    Returns:
        The same model, as it was before `insert`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The model is compiled, scripted or wrapped, or a name is no submodule behind which a block was
            inserted. The model is then unchanged.

    Examples:
        >>> from kfde_layers import CSFE, insert
        >>> model = insert(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), {"1": CSFE})
        >>> sorted(remove(model).state_dict())
        ['0.bias', '0.weight']
    """
    check_unwrapped(model)
    if isinstance(names, str):
        raise TypeError(f"names must be several names of modules, got the string {names!r}")
    holding = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if _INSERTED in module.__dict__
    }
    chosen = holding if names is None else dict.fromkeys(names)
    for name in chosen:
        if name not in holding:
            there = ", ".join(map(repr, holding)) or "nowhere"
            raise ValueError(f"names must be modules behind which a block was inserted ({there}), got {name!r}")
    for module in {holding[name]: None for name in chosen}:
        handle = module.__dict__.pop(_INSERTED)
        if handle is not None:
            handle.remove()
        delattr(module, CHILD)
    return model


def _adapted(block: nn.Module, at: Found) -> nn.Module:
    """The block in what makes it run on the output of the module."""
    if at.point.layout == "NHWC":
        block = ChannelsFirst(block)
    elif at.point.layout == "NLC":
        block = Tokens(block, at.grid, at.point.num_prefix_tokens)
    return block if at.key is None else Item(block, at.key)


def _run_child(self: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    # TorchScript compiles a hook like a method; hence the attribute by name, `self`, and the one type of output
    return self.kfde(output)  # pyright: ignore[reportCallIssue]


def _run_child_of_any(self: nn.Module, args: Any, output: Any) -> Any:
    return self.kfde(output)  # pyright: ignore[reportCallIssue]
