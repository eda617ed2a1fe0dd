"""Parameters of MFDF, for tests of the operation and of its fused implementation."""

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

from kfde_layers.functional import mfdf
from tests.support import oracle
from tests.support.agreement import as_numpy
from tests.support.inputs import draw

branch_shapes = st.lists(st.tuples(st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 2, 3])), min_size=1, max_size=4)


@dataclasses.dataclass
class MfdfParameters:
    """All tensors of an MFDF, large enough that every one of them matters."""

    branch_weights: list[Tensor]
    branch_biases: list[Tensor] | None
    fc: tuple[Tensor, Tensor, Tensor, Tensor]

    @classmethod
    def random(cls, channels, kernel_sizes, groups, bias=True, hidden=5, seed=0, dtype=torch.float64):
        def tensor(*shape):
            nonlocal seed
            seed += 1
            return 0.5 * draw(*shape, seed=seed, dtype=dtype)

        branches = len(kernel_sizes)
        return cls(
            [tensor(channels, channels // groups, size, size) for size in kernel_sizes],
            [tensor(channels) for _ in kernel_sizes] if bias else None,
            (
                tensor(hidden, channels),
                tensor(hidden),
                tensor(branches * channels, hidden),
                tensor(branches * channels),
            ),
        )

    def __call__(self, x, dilation, groups, impl="auto"):
        return mfdf(x, self.branch_weights, self.branch_biases, *self.fc, dilation, groups, impl=impl)

    def tensors(self):
        return [*self.branch_weights, *(self.branch_biases or []), *self.fc]

    def run_oracle(self, x, dilations, groups):
        weights, fc = map(as_numpy, self.branch_weights), map(as_numpy, self.fc)
        biases = [None] * len(dilations) if self.branch_biases is None else list(map(as_numpy, self.branch_biases))
        return oracle.mfdf(as_numpy(x), list(weights), biases, *fc, dilations, groups)
