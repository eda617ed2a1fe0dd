"""Try on a model what a block would do there, before anything is changed."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kfde_layers.insertion.points import CHILD, Seen, reason_children_are_special
from kfde_layers.insertion.running import run


def check_block(name: str, block: nn.Module, seen: Seen) -> None:
    """Refuse a block that does not run on the map or changes its shape; change neither it nor the model."""
    wanted = (seen.output.shape[0], seen.point.channels, *seen.map_size)
    try:
        trial = copy.deepcopy(block).to(seen.output.device, seen.output.dtype)
        shape = tuple(run(trial, torch.zeros_like(seen.output).new_zeros(wanted), ()).shape)
    except ValueError as error:
        reason = error.__cause__
        raise ValueError(f"the block at {name!r} does not run on its map of shape {wanted}: {reason}") from reason
    if shape != wanted:
        raise ValueError(f"the block at {name!r} must keep the shape {wanted} of its map, got {shape}")


class Noise(nn.Module):
    """Add noise to a map, a bit more than the map's own values, and count the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: int = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype)
        return x + noise * (1 + x.abs().mean())


def child_is_run(model: nn.Module, example: Tensor, name: str, noise: nn.Module) -> bool:
    """Return whether the named module runs a child that is added to it, after all others, as `nn.Sequential` does.

    Args:
        model: Unchanged afterwards.
        example: Input of the model.
        name: Name of the module.
        noise: A `Noise` for the module's output, which serves as the added child.

    Raises:
        ValueError: The module runs the child in another place, or its output changes because it has one more child.
    """
    module = model.get_submodule(name)
    (counter,) = (part for part in noise.modules() if isinstance(part, Noise))
    plain: list[Tensor] = []
    disturbed: list[Tensor] = []
    with_child: list[Tensor] = []

    def keep_plain_and_disturbed(module: nn.Module, args: Any, output: Any) -> None:
        plain.extend(_tensors(output))
        disturbed.extend(_tensors(noise(output)))

    def keep_with_child(module: nn.Module, args: Any, output: Any) -> None:
        with_child.extend(_tensors(output))

    run(model, example, [(module, keep_plain_and_disturbed)])
    counter.calls = 0
    module.add_module(CHILD, noise)
    try:
        run(model, example, [(module, keep_with_child)])
    except ValueError as error:
        raise ValueError(f"cannot insert at {name!r}: {reason_children_are_special(module)}") from error
    finally:
        delattr(module, CHILD)
    if not _close(disturbed if counter.calls else plain, with_child):
        raise ValueError(f"cannot insert at {name!r}: {reason_children_are_special(module)}")
    return bool(counter.calls)


def effects(model: nn.Module, example: Tensor, noises: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, bool]:
    """Return for each module whether the model's output changes if the module's map is disturbed.

    Without any effect of the input (zero-initialised head) nothing can be concluded: assume an effect.
    """
    undisturbed = _tensors(run(model, example, ()))
    if example.is_meta or _equal(undisturbed, _tensors(run(model, Noise()(example), ()))):
        return dict.fromkeys(noises, True)

    def outputs_with(module: nn.Module, noise: nn.Module) -> list[Tensor]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return noise(output)

        return _tensors(run(model, example, [(module, hook)]))

    return {module: not _equal(undisturbed, outputs_with(module, noise)) for module, noise in noises.items()}


def _tensors(output: Any) -> list[Tensor]:
    # copies, since the rest of the model may change its input in place
    return [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def _close(left: list[Tensor], right: list[Tensor]) -> bool:
    """Return whether two runs of one computation gave these; on a GPU the last bits may differ."""
    if [tensor.shape for tensor in left] != [tensor.shape for tensor in right]:
        return False

    def close(a: Tensor, b: Tensor) -> bool:
        if a.is_meta or not a.numel():
            return True
        return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3 * float(a.abs().amax()), equal_nan=True)

    return all(map(close, left, right))
