"""Memory that shows where a kernel reads or writes that it must not: NaN in new tensors and on both sides of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

_GUARD = 4096  # elements on each side


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Put a guard of NaN before and after each new floating-point tensor, and fill those without a value with NaN.

    A kernel that reads outside its tensors gets a NaN. One that writes there breaks a guard, which fails at the end.
    """
    buffers: list[tuple[Tensor, int]] = []

    def guarded(make: Callable[..., Tensor], fill: float) -> Callable[..., Tensor]:
        def make_guarded(*args: object, **kwargs: object) -> Tensor:
            plain = make(*args, **kwargs)
            if plain.is_meta or not plain.is_floating_point() or plain.numel() == 0:
                return plain
            size = 1 + sum((length - 1) * stride for length, stride in zip(plain.shape, plain.stride(), strict=True))
            buffer = torch.full((size + 2 * _GUARD,), float("nan"), dtype=plain.dtype, device=plain.device)
            buffers.append((buffer, size))
            return buffer.as_strided(plain.shape, plain.stride(), _GUARD).fill_(fill)

        return make_guarded

    nan = float("nan")
    with (
        mock.patch.object(torch, "empty_like", guarded(torch.empty_like, nan)),
        mock.patch.object(Tensor, "new_empty", guarded(Tensor.new_empty, nan)),
        mock.patch.object(Tensor, "new_zeros", guarded(Tensor.new_zeros, 0.0)),
    ):
        yield
    for buffer, size in buffers:
        for guard in (buffer[:_GUARD], buffer[_GUARD + size :]):
            assert guard.isnan().all(), f"{int((~guard.isnan()).sum())} elements were written outside of a tensor"
