"""Interpolate between the input and a block, with a learned weight per channel that starts at 0."""

import torch
from torch import Tensor, nn

from kfde_layers._checks import check_dtype, check_instance, check_int, check_map, check_shape


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

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `x` has other channels, or the block's output another shape.
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
        check_instance("block", block, nn.Module)
        channels = check_int("channels", channels, minimum=1)
        check_dtype("dtype", dtype)
        self.block = block
        self.blend: nn.Parameter = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Return to the identity."""
        nn.init.zeros_(self.blend)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if torch.jit.is_scripting():
            pass
        elif not isinstance(x, torch.fx.Proxy):
            check_map("x", x, self.blend.numel())
            check_shape("the output of block", y, tuple(x.shape))
        # under autocast a block may return another dtype than that of its input
        return torch.lerp(x, y.to(x.dtype), self.blend.to(x.dtype)[:, None, None])
