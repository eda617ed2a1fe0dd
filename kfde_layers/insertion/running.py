"""Run a network without leaving a trace in it."""

import random
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfde_layers._checks import check_instance
from kfde_layers.insertion.layouts import pair_of
from kfde_layers.insertion.restoring import copied_parameters, restored_attributes, restored_parameters


def check_unwrapped(model: nn.Module) -> None:
    """Refuse compiled, scripted and wrapped models: they would not see the block."""
    check_instance("model", model, nn.Module)
    for name, module in model.named_modules():
        where = f" (at {name!r})" if name else ""
        classes = [cls.__name__ for cls in type(module).__mro__]
        for wrapper in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"):
            if wrapper in classes:
                raise ValueError(f"model must not be wrapped yet, got {wrapper}{where}: insert first, then wrap")
        if "OptimizedModule" in classes or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"model must not be compiled yet, got a compiled module{where}: insert first, then compile"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"model must not be scripted yet, got a ScriptModule{where}: insert first, then script")


def example_for(model: nn.Module, example_input: Tensor | None) -> Tensor:
    """Return the caller's example, or an image of noise of the size and the channels that the model takes."""
    if example_input is not None:
        check_instance("example_input", example_input, Tensor)
        if example_input.ndim != 4:
            raise ValueError(f"example_input must have shape (N, C, H, W), got {tuple(example_input.shape)}")
        return example_input
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or not first.in_channels:
        raise ValueError("example_input is needed: the model has no nn.Conv2d from which to guess its input")
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    size = _declared_size(model, config)
    channels = getattr(model, "in_chans", first.in_channels)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, channels, *size, generator=generator, device="cpu", dtype=torch.float32)
    return noise.to(first.weight.device, first.weight.dtype)


def _declared_size(model: nn.Module, config: Any) -> tuple[int, int]:
    """Return height and width of the image for which a model was made, as it, its configuration or a part says."""
    outer, inner = [model, *model.children()], list(model.modules())
    sizes = [pair_of(module, "img_size") for module in outer]
    sizes += [config["input_size"][-2:] if "input_size" in config else None]
    sizes += [pair_of(module, name) for module in inner for name in ("img_size", "image_size")]
    return next((size for size in sizes if size is not None), (224, 224))


class Trial:
    """Runs of a model on an example, which leave no trace in it.

    Each run begins with the state that the model has when the trial is made, so all runs give the same: parameters,
    attributes, buffers and modes of all modules, and random numbers.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model
        self.example = example
        self._parameters = copied_parameters(model)

    def run(
        self,
        hooks: Iterable[tuple[nn.Module, Callable[..., Any]]] = (),
        example: Tensor | None = None,
        *,
        training: bool = False,
        seed: int = 0,
    ) -> Any:
        """Return the output of the model for its example or for another one, without gradient.

        Args:
            hooks: Modules, and forward hooks for them.
            example: Input of the model; None: the example of the trial.
            training: Whether all modules are in training mode instead of evaluation mode.
            seed: Seed of all random numbers.

        Raises:
            ValueError: The model does not run on the example.
        """
        example = self.example if example is None else example
        device = example.device
        autocast = nullcontext() if example.is_meta else torch.autocast(device.type, enabled=False)
        with ExitStack() as stack:  # which undoes every step, even if undoing another one fails
            stack.enter_context(restored_parameters(self._parameters))
            stack.enter_context(restored_attributes(self.model))
            for module in self.model.modules():
                module.training = training  # Set the flag directly: some models override eval().
            for module, hook in hooks:  # before other hooks, as the hooks that run blocks are
                stack.callback(module.register_forward_hook(hook, prepend=True).remove)
            stack.callback(random.setstate, random.getstate())
            stack.callback(np.random.set_state, np.random.get_state())
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            # torch.manual_seed would also seed devices that are not restored here
            (torch.cuda.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed)(seed)
            random.seed(seed)
            np.random.seed(seed)
            stack.enter_context(torch.no_grad())
            stack.enter_context(autocast)
            try:
                return self.model(example.clone())  # which the model may change in place
            except Exception as error:
                shape = tuple(example.shape)
                raise ValueError(
                    f"the model does not run on an input of shape {shape}; pass an example_input that fits"
                ) from error
