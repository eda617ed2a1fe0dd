"""A learned step from the identity to a block."""

import torch
from torch import Tensor, nn


class Blend(nn.Module):
    r"""Blend a block into its input, from not at all to wholly.

    \[ y = x + w\,(\mathrm{block}(x) - x) \]

    with w = `blend`, one weight per channel, learned from 0. At w = 0 the output is x to the last bit, so that a
    pretrained network starts unchanged; w = 1 is the block alone, as in the paper. At w = 0 the gradient of the
    block's own parameters is zero: they begin to learn one step after `blend` does. In a state dict the block's keys
    stand behind `block.`, so they differ from those of the unblended block.

    Args:
        block: Maps (N, C, H, W) to the same shape.
        channels: C.
        device: Of the parameter.
        dtype: Of the parameter.
    """

    def __init__(
        self,
        block: nn.Module,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.block = block
        self.blend: nn.Parameter = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Go back to the identity."""
        nn.init.zeros_(self.blend)

    def forward(self, x: Tensor) -> Tensor:
        # under autocast a block may answer in another format than it was asked in
        return torch.lerp(x, self.block(x).to(x.dtype), self.blend.to(x.dtype)[:, None, None])
