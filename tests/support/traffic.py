"""Count the bytes that kernels load and store, in Triton's interpreter. No cache is assumed.

A test file that imports this module first skips itself where Triton is not installed.
"""

from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from tests.support.kernels import recorded


class Traffic(NamedTuple):
    """What the launches of a call moved."""

    loaded: dict[str, int]
    """Bytes by kernel."""
    stored: dict[str, int]
    """Bytes by kernel."""
    launches: int
    """Number of launches."""

    def in_copies_of(self, x: Tensor) -> float:
        """Return all bytes over those of a copy of a map, which loads and stores each element once."""
        return sum((*self.loaded.values(), *self.stored.values())) / (2 * x.numel() * x.element_size())


def measure(module: ModuleType, call: Callable[[], object]) -> Traffic:
    """Run `call`, which launches kernels of `module`, and count."""
    loaded, stored = defaultdict(int), defaultdict(int)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    with recorded(module, run=True) as launches:

        def counted_load(self, ptrs, mask, *rest):
            result = load(self, ptrs, mask, *rest)
            loaded[launches[-1].name] += np.count_nonzero(mask.data) * result.data.itemsize
            return result

        def counted_store(self, ptrs, value, mask, *rest):
            stored[launches[-1].name] += np.count_nonzero(mask.data) * value.data.itemsize
            return store(self, ptrs, value, mask, *rest)

        with mock.patch.multiple(
            InterpreterBuilder, create_masked_load=counted_load, create_masked_store=counted_store
        ):
            call()
    return Traffic(dict(loaded), dict(stored), len(launches))
