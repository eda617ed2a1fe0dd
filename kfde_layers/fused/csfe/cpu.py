"""CFE, SFE and CSFE on CPU: in few calls, or over blocks of the map.

SFE alone needs one map besides x, and no blocks.
"""

from torch import Tensor

from kfde_layers.fused.csfe import blocks, samples
from kfde_layers.fused.csfe.options import CsfeOptions


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: CsfeOptions) -> tuple[Tensor, ...]:
    """Return y, dense in the memory format of the dense `x`, and what the backward pass needs besides the inputs."""
    if weight is None or bias is None or samples.fit_in_cache(x):
        return (samples.forward(x, weight, bias, options),)
    return blocks.forward(x, weight, bias, options)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: tuple[Tensor, ...],
    options: CsfeOptions,
    with_x: bool,
    with_parameters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `x`, and of `weight` and `bias`, that are asked for, and None for the others.

    `dy` has the strides of the dense `x`, and `saved` is what `forward` returns after y.
    """
    if weight is None or bias is None or samples.fit_in_cache(x):
        return samples.backward(dy, x, weight, bias, options, with_x, with_parameters)
    mean, m2 = saved
    return blocks.backward(dy, x, weight, bias, (mean, m2), options, with_x, with_parameters)
