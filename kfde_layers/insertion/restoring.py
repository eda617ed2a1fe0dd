"""Put back what a forward pass changes in a network."""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from operator import is_
from types import NoneType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Copies = Mapping[nn.Parameter, Tensor]

_ATOMS = frozenset((NoneType, bool, int, float, str))  # types of most attributes, which hold nothing that can change
# How to fill each type of container. Subclasses are left alone: they may refuse writes, or do more than that.
_FILL: dict[type, Callable[[Any, Any], object]] = {
    dict: dict.update,
    defaultdict: dict.update,
    Counter: dict.update,
    OrderedDict: OrderedDict.update,
    list: list.extend,
    deque: deque.extend,
    set: set.update,
}
# How to read and write the state of each type of generator of random numbers.
_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], object]]] = {
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
}


def copied_parameters(model: nn.Module) -> Copies:
    """Return a copy of each parameter. The parameters of a lazy module, which may have no shape yet, are left out."""
    return {
        parameter: parameter.detach().clone()
        for module in model.modules()
        if not _is_lazy(module)
        for parameter in module.parameters(recurse=False)
    }


@contextmanager
def restored_parameters(copies: Copies) -> Generator[None]:
    """Restore parameters that are changed in place, at the end."""
    with ExitStack() as stack:  # which undoes every change, even if undoing another one fails
        for parameter, value in copies.items():
            stack.callback(_restore_tensor, parameter, value)
        yield


@contextmanager
def restored_attributes(model: nn.Module) -> Generator[None]:
    """Restore attributes, registries, buffers and modes of all modules, at the end. A lazy module keeps its shapes.

    Tensors, NumPy's arrays, Python's containers (those of `_FILL`), namespaces, dataclasses and generators of random
    numbers that a module holds get their content back, at any depth. The content of parameters is left to
    `restored_parameters`. Objects of other types are not looked into.
    """
    contents = _Contents()
    modes: list[tuple[nn.Module, bool]] = []
    for module in model.modules():
        if _is_lazy(module):
            modes.append((module, module.training))
        else:
            contents.add(module.__dict__)
    try:
        yield
    finally:
        with ExitStack() as stack:  # which undoes every change, even if undoing another one fails
            for module, mode in modes:
                stack.callback(setattr, module, "training", mode)
            contents.restore(stack)


class _Contents:
    """What containers, tensors, arrays and generators hold. What is unchanged in the others is not written."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._empty: list[Any] = []  # apart, since each module has a dozen empty registries of hooks
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Any, Any]] = []

    def add(self, value: Any) -> None:
        """Remember the content of an object, and of all objects that it holds."""
        pending = [value]
        while pending:
            value = pending.pop()
            kind: type = type(value)  # `isinstance` would ask a weak reference's object, which may be gone
            if kind in _ATOMS:
                continue
            if kind in _FILL and not value:
                self._empty.append(value)
                continue
            if id(value) in self._seen:
                continue
            self._seen.add(id(value))
            if kind in _FILL:
                before: Any = dict(value) if issubclass(kind, dict) else [*value]
                self._containers.append((value, before))
                pending += before.values() if issubclass(kind, dict) else before
            elif issubclass(kind, tuple):
                pending += value
            elif kind is Tensor:
                if value.layout == torch.strided and not value.is_nested:
                    self._tensors.append((value, value.detach().clone()))
            elif kind is np.ndarray and value.flags.writeable:
                self._arrays.append((value, value.copy()))
            elif kind in _GENERATORS:
                read, _ = _GENERATORS[kind]
                self._generators.append((value, read(value)))
            elif kind is SimpleNamespace or (is_dataclass(kind) and hasattr(value, "__dict__")):
                pending.append(value.__dict__)

    def restore(self, stack: ExitStack) -> None:
        """Have each object restored when the stack is left."""
        for generator, state in self._generators:
            _, write = _GENERATORS[type(generator)]
            stack.callback(write, generator, state)
        for array, values in self._arrays:
            stack.callback(_restore_array, array, values)
        for tensor, value in self._tensors:
            stack.callback(_restore_tensor, tensor, value)
        for container in filter(None, self._empty):
            stack.callback(container.clear)
        for container, before in self._containers:
            if not _holds(container, before):
                stack.callback(_refill, container, before)


def _holds(container: Any, entries: Any) -> bool:
    """Return whether a container holds these very objects, in this order."""
    if len(container) != len(entries) or not all(map(is_, container, entries)):
        return False
    return not isinstance(container, dict) or all(map(is_, container.values(), entries.values()))


def _refill(container: Any, entries: Any) -> None:
    container.clear()
    _FILL[type(container)](container, entries)


def _restore_array(array: Any, values: Any) -> None:
    if array.shape != values.shape or array.tobytes() != values.tobytes():
        array.setflags(write=True)
        array.resize(values.shape, refcheck=False)
        array[...] = values


def _restore_tensor(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
        tensor.data = value
    # Write only what has changed: autograd counts writes, and a graph of the caller may hold the tensor.
    elif not tensor.is_meta and not _equal(tensor, value):
        with torch.no_grad():
            tensor.copy_(value)


def _equal(tensor: Tensor, value: Tensor) -> bool:
    """Return whether two tensors of one shape are equal, where NaN equals NaN."""
    return torch.equal(tensor, value) or bool(((tensor == value) | ((tensor != tensor) & (value != value))).all())


def _is_lazy(module: nn.Module) -> bool:
    return any(map(is_lazy, [*module.parameters(recurse=False), *module.buffers(recurse=False)]))
