"""Interpolate between the input and a block, with a learned weight per channel that starts at 0."""

import torch
from torch import Tensor, nn


class Blend(nn.Module):
    r"""Interpolate between the input and a block, with a learned weight per channel that starts at 0.

    \[ y = x + w\,(\mathrm{block}(x) - x) \]

    with w = `blend`, one weight per channel. At w = 0 the output is x to the last bit, so that a pretrained network
    starts unchanged; w = 1 is the block alone, as in the paper. At w = 0 the gradient of the block's own parameters is
    zero: in the first step only `blend` learns. In a state dict the block's keys start with `block.`, so they differ
    from those of the block alone.

    Args:
        block: Maps (N, C, H, W) to the same shape.
        channels: C.
        device: Device of the parameter.
        dtype: Dtype of the parameter.
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
        """Return to the identity."""
        nn.init.zeros_(self.blend)

    def forward(self, x: Tensor) -> Tensor:
        # under autocast a block may return another dtype than that of its input
        return torch.lerp(x, self.block(x).to(x.dtype), self.blend.to(x.dtype)[:, None, None])
