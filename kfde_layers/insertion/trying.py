"""Try on a model what a block would do there, before anything is changed."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kfde_layers.insertion.probing import CHILD, Found, own_way, run


def check_block(name: str, block: nn.Module, at: Found) -> None:
    """Refuse a block that does not run on the map or changes its shape; neither it nor the model is touched."""
    height, width = at.grid
    given = (at.output.shape[0], at.point.channels, height, width)
    try:
        trial = copy.deepcopy(block).to(at.output.device, at.output.dtype)
        shape = tuple(run(trial, torch.zeros_like(at.output).new_zeros(given), ()).shape)
    except ValueError as error:
        reason = error.__cause__
        raise ValueError(f"the block at {name!r} does not run on its map of shape {given}: {reason}") from reason
    if shape != given:
        raise ValueError(f"the block at {name!r} must keep the shape {given} of its map, got {shape}")


class Noise(nn.Module):
    """Disturb a map by as much as it varies, and count how often."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: int = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype)
        return x + noise * (1 + x.abs().mean())


def runs_a_child(model: nn.Module, example: Tensor, name: str, noise: nn.Module) -> bool:
    """Whether the module of that name runs a child that is added to it, behind all others, as nn.Sequential does.

    Raises:
        ValueError: The child is run otherwise, or alters the module's output by being there.
    """
    module = model.get_submodule(name)
    (counter,) = (part for part in noise.modules() if isinstance(part, Noise))
    bare: list[Tensor] = []
    disturbed: list[Tensor] = []
    joined: list[Tensor] = []

    def keep_both(module: nn.Module, args: Any, output: Any) -> None:
        bare.extend(_numbers(output))
        disturbed.extend(_numbers(noise(output)))

    def keep_joined(module: nn.Module, args: Any, output: Any) -> None:
        joined.extend(_numbers(output))

    run(model, example, [(module, keep_both)])
    counter.calls = 0
    module.add_module(CHILD, noise)
    try:
        run(model, example, [(module, keep_joined)])
    except ValueError as error:
        raise ValueError(f"cannot insert at {name!r}: {own_way(module)}") from error
    finally:
        delattr(module, CHILD)
    if not _alike(disturbed if counter.calls else bare, joined):
        raise ValueError(f"cannot insert at {name!r}: {own_way(module)}")
    return bool(counter.calls)


def effects(model: nn.Module, example: Tensor, disturbers: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, bool]:
    """For each module, whether the model's output depends on its map, seen by disturbing each once.

    Where it does not depend on the example either, as with a head that starts from zeros, nothing can be told, and it
    counts as if it did.
    """
    before = _numbers(run(model, example, ()))
    if example.is_meta or _same(before, _numbers(run(model, Noise()(example), ()))):
        return dict.fromkeys(disturbers, True)

    def after(module: nn.Module, noise: nn.Module) -> list[Tensor]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return noise(output)

        return _numbers(run(model, example, [(module, hook)]))

    return {module: not _same(before, after(module, noise)) for module, noise in disturbers.items()}


def _numbers(output: Any) -> list[Tensor]:
    # copies, since what follows in the model may change its input in place
    return [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _alike(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two runs of the same computation gave these; on a GPU they may differ in the last bits."""
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return False

    def near(a: Tensor, b: Tensor) -> bool:
        if a.is_meta or not a.numel():
            return True
        return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3 * float(a.abs().amax()), equal_nan=True)

    return all(map(near, one, other))
