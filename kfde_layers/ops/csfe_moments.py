"""CFE and SFE from one set of moments per channel: the mathematics of their fused forms."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_OPEN = 2.0  # stands for w_1 = 1, w_2 = 0; no sigmoid comes near it
_SMALLEST_SUM = 1e-6  # of gamma: nearer to zero, its inverse would swamp the gate


class Enhancement(NamedTuple):
    """The hyper-parameters of CFE, SFE, or the scaled sum of both. Without gamma and beta there is no CFE."""

    num_groups: int = 1
    threshold: float = 0.5
    eps: float = 1e-5
    spatial: bool = False
    """Whether there is an SFE."""
    lambd: float = 1e-4
    beta: float = 0.5
    correction: int = 0
    scale: float = 1.0


class Moments(NamedTuple):
    """Of each channel of each sample, over its n positions; (N, C)."""

    mean: Tensor
    m2: Tensor
    """The sum of the squared deviations from the mean."""
    n: int


class ChannelGate(NamedTuple):
    """CFE's gate as a line in the deviation u from the channel's mean: z = slope u + shift."""

    slope: Tensor
    """gamma w_gamma over the deviation of the group, (N, C)."""
    shift: Tensor
    w_gamma: Tensor
    """(C,)"""
    inverse_std: Tensor
    """Of the channel's group, (N, C)."""
    offset: Tensor
    """Mean of the channel less mean of its group, (N, C)."""


def logit(probability: float) -> float:
    """Where the sigmoid takes the value `probability`: the threshold on r, said of z."""
    return math.log(probability / (1 - probability))


def away_from_zero(total: Tensor) -> Tensor:
    """The sum of gamma, or the nearest number that is safe to divide by; then a constant for the gradient."""
    smallest = torch.full_like(total, _SMALLEST_SUM)
    nearest = torch.where(total < 0, -smallest, smallest)
    return torch.where(total.abs() < _SMALLEST_SUM, nearest, total)


def channel_gate(moments: Moments, gamma: Tensor, beta: Tensor, options: Enhancement) -> ChannelGate:
    """Equations (1)-(2), with the moments of the groups put together from those of their channels."""
    mean, m2, n = moments
    by_group = mean.unflatten(1, (options.num_groups, -1))
    offset = by_group - by_group.mean(dim=2, keepdim=True)
    variance = (m2.view_as(by_group) * (1 / max(n, 1)) + offset.square()).mean(dim=2, keepdim=True)
    inverse_std = (variance + options.eps).rsqrt().expand_as(by_group).flatten(1)
    offset = offset.flatten(1)
    w_gamma = gamma * (1 / away_from_zero(gamma.sum()))  # (1)
    slope = gamma * w_gamma * inverse_std
    return ChannelGate(slope, w_gamma * beta + slope * offset, w_gamma, inverse_std, offset)


def spatial_slope(moments: Moments, options: Enhancement) -> Tensor:
    """Equation (8) without beta, (N, C): what multiplies the squared deviation."""
    variance = moments.m2 * (1 / max(moments.n - options.correction, 1))  # (7)
    return 0.25 / (variance + options.lambd)


def enhance(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Enhancement) -> Tensor:
    """The scaled sum of the branches in the format of `x`, in operations that compilers fuse well.

    They repeat what is done per channel for each element rather than keep it, unless it comes out of a reduction: hence
    `_kept`, and products with an inverse, where a quotient would cost as much as a sigmoid.
    """
    n = x.shape[2] * x.shape[3]
    mean = x.sum(dim=(2, 3), keepdim=True) * (1 / max(n, 1))
    u = x - mean
    moments = Moments(mean[:, :, 0, 0], u.square().sum(dim=(2, 3)), n)
    own = 0.0
    if options.spatial:
        own = (_kept(spatial_slope(moments, options)) * u.square() + options.beta).sigmoid()
    if weight is None or bias is None:
        y = x * own
    else:
        line = channel_gate(moments, weight.to(x.dtype), bias.to(x.dtype), options)
        z = _kept(line.slope) * u + _kept(line.shift)
        # One tensor tells r where closed from open, since compilers keep in memory what both halves read.
        gate = torch.where(z > logit(options.threshold), _OPEN, z.sigmoid())
        first, second = (x * (gate.clamp(max=1) + own)).chunk(2, dim=1)
        weak_first, weak_second = (x * torch.where(gate < _OPEN, gate, 0.0)).chunk(2, dim=1)
        y = torch.cat((first + weak_second, second + weak_first), dim=1)
    return options.scale * y


def _kept(values: Tensor) -> Tensor:
    """(N, C) as (N, C, 1, 1), by way of a mean of equal values; a reduction of fewer than 8 would be unrolled."""
    return values[:, :, None, None, None].expand(-1, -1, 1, 1, 8).mean(dim=-1)
