"""CFE and SFE from one set of moments per channel: the equations of their fused implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from kfde_layers._impl import exporting
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.ops.formats import split_channels
from kfde_layers.ops.gate import away_from_zero, logit

_OPEN = 2.0  # marks an open gate, w1 = 1 and w2 = 0; every sigmoid is below 1


class Moments(NamedTuple):
    """Moments of each channel of each sample over its n positions."""

    mean: Tensor
    """Mean, rounded to its dtype, (N, C)."""
    mean_low: Tensor
    """Mean less `mean`, which the rounding left out, (N, C)."""
    m2: Tensor
    """Sum of the squared deviations from the mean, (N, C)."""
    n: int
    """Number of positions, H W."""


def moments_from_sums(mean: Tensor, u_sum: Tensor, uu_sum: Tensor, n: int) -> Moments:
    """Return the moments from the rounded means, and from the sums of u = x - mean and of its square, all (N, C).

    Where a mean is large next to the deviations, its rounding is as large as they are, and u has a mean of its own.
    """
    mean_low = u_sum * inverse(n, u_sum)
    return Moments(mean, mean_low, (uu_sum - mean_low * u_sum).clamp(min=0), n)


def inverse(n: int, like: Tensor) -> Tensor | float:
    """Return 1 / n, and 1 where n is 0, as on an empty map; as a tensor, it has the dtype of `like`.

    An exporter records arithmetic of sizes, and not every converter has the quotient and the maximum of two integers.
    """
    if isinstance(n, torch.SymInt) and exporting():
        return 1 / torch.scalar_tensor(n, dtype=like.dtype, device=like.device).clamp(min=1)
    if isinstance(n, Tensor):  # in torch.jit.trace
        return 1 / n.to(like.dtype).clamp(min=1)
    return 1 / max(n, 1)


class ChannelGate(NamedTuple):
    """CFE's gate as a line in the deviation u from the channel's mean: z = slope u + intercept."""

    slope: Tensor
    """gamma w_gamma times `inverse_std`, (N, C)."""
    intercept: Tensor
    """z at the channel's mean, (N, C)."""
    w_gamma: Tensor
    """Weights of eq. (1), (C,)."""
    inverse_std: Tensor
    """Inverse standard deviation of the channel's group, (N, C)."""
    mean_offset: Tensor
    """Mean of the channel less the mean of its group, (N, C)."""


def channel_gate(moments: Moments, gamma: Tensor, beta: Tensor, options: CsfeOptions) -> ChannelGate:
    """Return equations (1)-(2); the moments of the groups follow from those of their channels."""
    mean, mean_low, m2, n = moments
    by_group = split_channels(mean, options.num_groups)
    mean_offset = by_group - by_group.mean(dim=2, keepdim=True) + split_channels(mean_low, options.num_groups)
    mean_offset = mean_offset - mean_offset.mean(dim=2, keepdim=True)
    variance = (split_channels(m2, options.num_groups) * inverse(n, m2) + mean_offset.square()).mean(
        dim=2, keepdim=True
    )
    inverse_std = (1 / (variance + options.eps).sqrt()).expand_as(by_group).flatten(1)
    mean_offset = mean_offset.flatten(1)
    w_gamma = gamma * (1 / away_from_zero(gamma.sum().view(1)))  # (1); Core ML cannot choose between scalars
    slope = gamma * w_gamma * inverse_std
    return ChannelGate(slope, w_gamma * beta + slope * mean_offset, w_gamma, inverse_std, mean_offset)


def spatial_root(moments: Moments, options: CsfeOptions) -> Tensor:
    """Return the factor of the deviation in eq. (8), (N, C), of which the square is the score."""
    variance = moments.m2 * inverse(moments.n - options.correction, moments.m2)  # (7)
    return 0.5 / (variance + options.lambd).sqrt()


def csfe_from_moments(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: CsfeOptions) -> Tensor:
    """Return `scale * (CFE(x) + SFE(x))` in the dtype of `x`, in operations that compilers fuse well.

    Inductor recomputes per-channel values at every element unless a reduction produces them; `_per_channel_reduced`
    adds one. A quotient would then cost as much as a sigmoid, hence the products with an inverse. An inverse root is a
    quotient by a root, since the gradient of `rsqrt` is a third power, which vanishes where x is large.
    """
    n = x.shape[2] * x.shape[3]
    mean = x.sum(dim=(2, 3), keepdim=True) * inverse(n, x)
    u = x - mean
    moments = moments_from_sums(mean[:, :, 0, 0], u.sum(dim=(2, 3)), u.square().sum(dim=(2, 3)), n)
    u = u - moments.mean_low[:, :, None, None]
    sfe_gate = 0.0
    if options.with_sfe:
        root = _per_channel_reduced(spatial_root(moments, options))
        sfe_gate = ((root * u).square() + options.beta).sigmoid()
    if weight is None or bias is None:
        y = x * sfe_gate
    else:
        line = channel_gate(moments, weight.to(x.dtype), bias.to(x.dtype), options)
        z = _per_channel_reduced(line.slope) * u + _per_channel_reduced(line.intercept)
        # Encode r and "open" in one tensor: both halves read it, so it is materialised once.
        is_open, not_open = z.new_full((1,), _OPEN), z.new_zeros(1)  # tensors: Core ML chooses between no numbers
        gate = torch.where(z > logit(options.threshold), is_open, z.sigmoid())
        first, second = _halves(x * (gate.clamp(max=1) + sfe_gate))
        weak_first, weak_second = _halves(x * torch.where(gate < _OPEN, gate, not_open))
        y = torch.cat((first + weak_second, second + weak_first), dim=1)
    return options.scale * y


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two halves of the channels, without `chunk`: it returns a list, where ExecuTorch fixes the batch."""
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


def _per_channel_reduced(values: Tensor) -> Tensor:
    """Return (N, C) as (N, C, 1, 1), by a mean of equal values; Inductor would unroll a mean of fewer than 8."""
    return values[:, :, None, None, None].expand(-1, -1, 1, 1, 8).mean(dim=-1)
