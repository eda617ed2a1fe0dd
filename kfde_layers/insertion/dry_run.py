"""Try on a model what a block would do there, before anything is changed."""

import copy
from collections import UserList
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kfde_layers.insertion.adapters import items
from kfde_layers.insertion.joining import CHILD
from kfde_layers.insertion.points import Seen, reason_children_are_special
from kfde_layers.insertion.running import Trial

Part = TypeVar("Part", bound=nn.Module)


def check_block(name: str, block: nn.Module, seen: Seen) -> None:
    """Refuse a block that does not map the feature map to another one like it; change neither it nor the model."""
    wanted = (seen.output.shape[0], seen.point.channels, *seen.map_size)
    dtype = seen.output.dtype
    x = noise_like(seen.output.new_empty(wanted))
    copied = copy.deepcopy(block).to(x.device, dtype).requires_grad_(False)  # a gradient can come from the map alone
    try:
        y = Trial(_WithGradient(copied), x).run()
    except ValueError as error:
        reason = error.__cause__
        raise ValueError(f"the block at {name!r} does not run on its map of shape {wanted}: {reason}") from reason
    if not isinstance(y, Tensor):
        raise ValueError(f"the block at {name!r} must return one tensor, got {type(y).__name__}")
    if tuple(y.shape) != wanted:
        raise ValueError(f"the block at {name!r} must keep the shape {wanted} of its map, got {tuple(y.shape)}")
    if y.dtype != dtype:
        raise ValueError(f"the block at {name!r} must keep the dtype {dtype} of its map, got {y.dtype}")
    if not y.is_meta and not y.isfinite().all():
        raise ValueError(f"the block at {name!r} must return finite values for a map of noise, got others")
    if not y.requires_grad:
        raise ValueError(
            f"the block at {name!r} must pass gradients to its map, got an output that is detached from it"
        )


class _WithGradient(nn.Module):
    """Run a block on a map that needs a gradient, and that the block may change in place."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            return self.block(x.requires_grad_().clone())


class Noise(nn.Module):
    """Add noise to a map, a bit more than the map's own values, and count the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: UserList[torch.Size] = UserList()  # no list, since `run` would restore it

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x.shape)
        return x + noise_like(x) * (1 + x.abs().mean())


def check_training(trial: Trial, seen_at: Mapping[str, Seen]) -> None:
    """Refuse a module that the model calls several times in training, or that returns other tokens there."""
    outputs: dict[str, list[Any]] = {name: [] for name in seen_at}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: outputs[name].append(output)

    with suppress(ValueError):  # the example may be too small, such as one value per channel for a batch norm
        trial.run([(trial.model.get_submodule(name), keep(name)) for name in outputs], training=True)
    for name, calls in outputs.items():
        if len(calls) > 1:
            raise ValueError(
                f"cannot insert at {name!r}: in training the forward pass calls it {len(calls)} times, and each call "
                "would run the same block"
            )
        seen = seen_at[name]
        for output in calls:
            tensor = output if seen.key is None else items(output).get(seen.key)
            if not isinstance(tensor, Tensor) or tensor.ndim != seen.output.ndim:
                raise ValueError(
                    f"cannot insert at {name!r}: in training it does not return the map that it else returns"
                )
            if seen.point.layout == "NLC" and tensor.shape[1] != seen.output.shape[1]:
                raise ValueError(
                    f"cannot insert at {name!r}: in training it returns {tensor.shape[1]} tokens instead of "
                    f"{seen.output.shape[1]}, and those that are left are no map; without dropping of tokens "
                    "(patch_drop_rate=0) it can"
                )


def outputs_of(trial: Trial, names: Iterable[str], seed: int = 0) -> dict[str, Any]:
    """Return what each named module returns, from a run with this seed of all random numbers."""
    outputs: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        # a copy, since the rest of the model may change its input in place
        return lambda module, args, output: outputs.update({name: copy.deepcopy(output)})

    trial.run([(trial.model.get_submodule(name), keep(name)) for name in names], seed=seed)
    return outputs


def check_order(trial: Trial, seen_at: Mapping[str, Seen], plain: Mapping[str, Any]) -> None:
    """Refuse tokens that are chosen at random, in evaluation too, as those of a masked image are.

    `plain` is what `outputs_of` returned.
    """
    sequences = [name for name, seen in seen_at.items() if seen.point.layout == "NLC"]
    for name, output in (outputs_of(trial, sequences, seed=1) if sequences else {}).items():
        if not close(tensors_in(plain[name]), tensors_in(output)):
            raise ValueError(
                f"cannot insert at {name!r}: its tokens depend on random numbers, in evaluation too, as those of a "
                "masked image do; they are no map"
            )


def runs_children(trial: Trial, noises: Mapping[str, nn.Module], plain: Mapping[str, Any]) -> dict[str, bool]:
    """Return for each named module whether it runs a child that is added after all others, as `nn.Sequential` does.

    Args:
        trial: The model, unchanged afterwards.
        noises: For each name, a `Noise` for the module's output, which serves as the added child.
        plain: For each name, the module's output, as `outputs_of` returned it.

    Raises:
        ValueError: A module runs the child in another place, or its output changes because it has one more child.
    """
    try:
        return _run_children(trial, noises, plain)
    except ValueError:
        ran: dict[str, bool] = {}
        for name, noise in noises.items():  # one by one, to name the module that does not run with one more child
            ran |= _run_children(trial, {name: noise}, plain)
        return ran


def _run_children(trial: Trial, noises: Mapping[str, nn.Module], plain: Mapping[str, Any]) -> dict[str, bool]:
    """Answer in one run of the model; `plain` holds the modules' outputs without an added child."""
    modules = {name: trial.model.get_submodule(name) for name in noises}
    with_child: dict[str, list[Tensor]] = {}

    def keep_and_undo(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            with_child[name] = tensors_in(output)
            return copy.deepcopy(plain[name])  # so that no child disturbs the modules that follow

        return hook

    counters = {name: part_of(noise, Noise) for name, noise in noises.items()}
    for counter in counters.values():
        counter.calls.clear()
    for name, noise in noises.items():
        modules[name].add_module(CHILD, noise)
    try:
        trial.run([(module, keep_and_undo(name)) for name, module in modules.items()])
    except ValueError as error:
        name = next(iter(noises))
        raise ValueError(f"cannot insert at {name!r}: {reason_children_are_special(modules[name])}") from error
    finally:
        for module in modules.values():
            delattr(module, CHILD)
    ran = {name: bool(counter.calls) for name, counter in counters.items()}
    for name, noise in noises.items():
        expected = noise(copy.deepcopy(plain[name])) if ran[name] else plain[name]
        if not close(tensors_in(expected), with_child[name]):
            raise ValueError(f"cannot insert at {name!r}: {reason_children_are_special(modules[name])}")
    return ran


def part_of(adapted: nn.Module, kind: type[Part]) -> Part:
    """Return the part of this kind in a module that may be wrapped in adapters."""
    (part,) = (part for part in adapted.modules() if isinstance(part, kind))
    return part


def noise_like(x: Tensor) -> Tensor:
    """Return noise of the shape, the dtype and the device of a tensor, the same at every call."""
    # on the CPU, whatever PyTorch's default device is, so that it is the same noise everywhere
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    return noise.to(x.device, x.dtype)


def tensors_in(output: Any) -> list[Tensor]:
    """Return a copy of each tensor of a model's output."""
    # copies, since the rest of the model may change its input in place
    return [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def close(left: list[Tensor], right: list[Tensor]) -> bool:
    """Return whether two runs of one computation gave these; on a GPU the last bits may differ."""
    if [tensor.shape for tensor in left] != [tensor.shape for tensor in right]:
        return False

    def close(a: Tensor, b: Tensor) -> bool:
        if a.is_meta or not a.numel():
            return True
        largest = float(a.abs().nan_to_num(0, 0, 0).amax())
        return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3 * largest, equal_nan=True)

    return all(map(close, left, right))
