"""Whether the output of a model depends on a map in it."""

import copy
from collections import UserList
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfde_layers.insertion.dry_run import Noise, noise_like, part_of, tensors_in
from kfde_layers.insertion.running import Trial


class Tap(nn.Module):
    """Add zeros to a map, through which the gradient of the map can be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros: UserList[Tensor] = UserList()  # no list, since `run` would restore it

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros_like(x, requires_grad=True)
        self.zeros.append(zeros)
        return x + zeros


def have_effects(trial: Trial, taps: Mapping[str, nn.Module], noises: Mapping[str, nn.Module]) -> dict[str, bool]:
    """Return for each named module whether the model's output depends on the module's map.

    One pass forward and backward answers for all maps that get a gradient; in a deep network small gradients may need
    float64. The other maps are disturbed, in a run for all of them, and in more runs if that changes the output.

    Args:
        trial: The model, unchanged afterwards.
        taps: For each name, a `Tap` for the module's output.
        noises: For each name, a `Noise` for the module's output.
    """
    effects: dict[str, bool] = dict.fromkeys(noises, False)
    for dtype in (trial.example.dtype, torch.float64):
        doubtful = [name for name in noises if not effects[name]]
        if doubtful:
            effects |= _have_gradients(trial, {name: taps[name] for name in doubtful}, dtype)
    doubtful = {name: noise for name, noise in noises.items() if not effects[name]}
    return effects | _change_the_output(trial, doubtful) if doubtful else effects


def _have_gradients(trial: Trial, taps: Mapping[str, nn.Module], dtype: torch.dtype) -> dict[str, bool]:
    """Return for each map whether its gradient is not zero.

    A copy of the model runs, without backward hooks: gradients must not reach the tensors and hooks of the model
    itself. If no copy can be made, or it does not run backward in this dtype, the answer is False for all.
    """

    def through(tap: nn.Module) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda module, args, output: tap(output)

    try:
        copied = copy.deepcopy(trial.model).requires_grad_(False).to(dtype)
        for module in copied.modules():
            module._backward_hooks.clear()  # pyright: ignore[reportPrivateUsage]
            module._backward_pre_hooks.clear()  # pyright: ignore[reportPrivateUsage]
        hooks = [(copied.get_submodule(name), through(tap)) for name, tap in taps.items()]
        gradients = Trial(_Gradients(copied, taps.values()), trial.example.to(dtype)).run(hooks)
    except Exception:  # of the model's own code, which can fail in any way
        return dict.fromkeys(taps, False)
    return {name: _is_nonzero(gradient) for name, gradient in zip(taps, gradients, strict=True)}


class _Gradients(nn.Module):
    """Run a model forward and backward, and return the gradients of the maps that taps have seen."""

    def __init__(self, model: nn.Module, taps: Iterable[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.taps = tuple(taps)

    def forward(self, x: Tensor) -> list[Tensor | None]:
        with torch.enable_grad():
            outputs = [output for output in tensors_in(self.model(x)) if output.requires_grad]
            zeros = [part_of(tap, Tap).zeros[-1] for tap in self.taps]
            torch.autograd.backward(outputs, [noise_like(output) for output in outputs], inputs=zeros)
        return [tensor.grad for tensor in zeros]


def _is_nonzero(gradient: Tensor | None) -> bool:
    if gradient is None or gradient.is_meta:
        return gradient is not None
    return bool(gradient.isfinite().all()) and bool(gradient.any())


def _change_the_output(trial: Trial, noises: Mapping[str, nn.Module]) -> dict[str, bool]:
    """Return for each map whether the model's output changes if the map is disturbed.

    Without any effect of the input (zero-initialised head) nothing can be concluded: assume an effect.
    """
    undisturbed = tensors_in(trial.run())
    if trial.example.is_meta or _equal(undisturbed, tensors_in(trial.run(example=Noise()(trial.example)))):
        return dict.fromkeys(noises, True)

    def through(noise: nn.Module) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda module, args, output: noise(output)

    def effects_of(names: list[str]) -> dict[str, bool]:
        """Disturb all these maps at once, and halves of them only if that changes the output."""
        hooks = [(trial.model.get_submodule(name), through(noises[name])) for name in names]
        changed = not _equal(undisturbed, tensors_in(trial.run(hooks)))
        if not changed or len(names) == 1:
            return dict.fromkeys(names, changed)
        half = len(names) // 2
        return effects_of(names[:half]) | effects_of(names[half:])

    return effects_of(list(noises))


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))
