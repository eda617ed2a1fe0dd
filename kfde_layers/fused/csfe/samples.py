"""CFE, SFE and CSFE on CPU in few calls: whole samples, as many at once as stay in the cache.

On a small map a call of PyTorch takes longer than its arithmetic. `native_group_norm` does in one call what takes six
steps: of a map less its means it returns the logit of eq. (2), if gamma w_gamma and beta w_gamma are its affine
parameters. It subtracts a mean of its own, and so finds what the rounding of those means has left.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.ops.formats import memory_format, upcast
from kfde_layers.ops.gate import away_from_zero, is_near_zero, logit

CACHE = 2**22  # elements that stay in the cache between two steps: 16 MiB in float32
_FORWARD_MAPS, _BACKWARD_MAPS = 5, 9  # as large as x, that are in use at once

_group_norm = torch.native_group_norm
_group_norm_backward = torch.ops.aten.native_group_norm_backward.default
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


def fit_in_cache(x: Tensor) -> bool:
    """Return whether a sample and its maps stay in the cache. Others are cut into blocks, which takes more calls.

    The batch does not count: a sample must not change its bits, and with them a gate near its threshold, with its
    company.
    """
    _, channels, height, width = x.shape
    return _FORWARD_MAPS * channels * height * width <= CACHE


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: CsfeOptions) -> Tensor:
    """Return y, dense in the memory format of the dense `x`."""
    cfe = _cfe(x, weight, bias, options)
    samples = x.shape[0] if cfe is None else _samples_at_once(x, _FORWARD_MAPS)
    if samples == x.shape[0]:
        return _like(x, _forward(_prepared(x, cfe), cfe, options))
    y = torch.empty_like(x)
    for x_part, y_part in zip(x.split(samples), y.split(samples), strict=True):
        y_part.copy_(_forward(_prepared(x_part, cfe), cfe, options))
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: CsfeOptions,
    with_x: bool,
    with_parameters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `x`, and of `weight` and `bias`, that are asked for, and None for the others.

    `dy` has the strides of the dense `x`.
    """
    cfe = _cfe(x, weight, bias, options)
    samples = x.shape[0] if cfe is None else _samples_at_once(x, _BACKWARD_MAPS)
    dx = torch.empty_like(x) if with_x and samples < len(x) else None
    dslope = dintercept = None
    for start in range(0, len(x), samples):
        x_part, dy_part = (_prepared(tensor[start : start + samples], cfe) for tensor in (x, dy))
        dx_part, *sums = _backward(dy_part, x_part, cfe, options, with_x, with_parameters)
        if dx is not None and dx_part is not None:
            dx[start : start + samples].copy_(dx_part)
        elif dx_part is not None:  # the only part
            dx = _like(x, dx_part)
        dslope, dintercept = (_sum(*pair) for pair in zip((dslope, dintercept), sums, strict=True))
    if cfe is None or weight is None or bias is None or dslope is None or dintercept is None:
        return dx, None, None
    dgamma, dbeta = cfe.gradients(dslope, dintercept)
    return dx, dgamma.to(weight.dtype), dbeta.to(bias.dtype)


def _samples_at_once(x: Tensor, maps: int) -> int:
    """Return in how large parts to take the samples: as many as fit in the cache with so many maps, evenly divided."""
    samples, elements = x.shape[0], x.numel()
    if maps * elements <= CACHE:
        return samples
    parts = math.ceil(samples / max(1, CACHE * samples // (maps * elements)))
    return math.ceil(samples / parts)


def _prepared(x: Tensor, cfe: "_Cfe | None") -> Tensor:
    """Return a map in the dtype of the statistics; for CFE contiguous, where group norm is fast and exact."""
    return upcast(x) if cfe is None else upcast(x).contiguous()


def _like(x: Tensor, result: Tensor) -> Tensor:
    """Return the result in dtype and memory format of the dense `x`."""
    if result.stride() != x.stride():
        result = result.contiguous(memory_format=memory_format(x))
    return result if result.dtype == x.dtype else result.to(x.dtype)


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total.add_(part)


class _Cfe(NamedTuple):
    """The part of CFE that does not depend on the map."""

    gamma: Tensor
    """Gamma, (C,)."""
    beta: Tensor
    """Beta, (C,)."""
    divisor: Tensor
    """The sum of gamma, or what stands for it, ()."""
    guarded: bool
    """Whether something else stands for the sum, and is a constant for the gradient."""
    w_gamma: Tensor
    """Weights of eq. (1), (C,)."""
    slope: Tensor
    """Gamma times w_gamma, (C,)."""
    intercept: Tensor
    """Beta times w_gamma, (C,)."""
    options: CsfeOptions
    """The hyper-parameters."""

    def logits(self, x: Tensor, means: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x less the means of its groups; z of that; and mean and inverse deviation of its groups, (N, G).

        `means` are those of the channels, if they are known.
        """
        samples, channels, height, width = x.shape
        groups, of_group = self.options.num_groups, channels // self.options.num_groups
        by_group = x.view(samples, groups, of_group, height, width)
        if means is None:
            group_means = by_group.mean((2, 3, 4), keepdim=True)
        else:
            group_means = means.view(samples, groups, of_group, 1, 1).mean(2, keepdim=True)
        centred = by_group - group_means
        sizes = samples, channels, height * width, groups
        z, mean, inverse_std = _group_norm(centred, self.slope, self.intercept, *sizes, self.options.eps)
        return centred, z.view(x.shape), mean, inverse_std

    def gate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return w_2 of eq. (3), in the memory of `z`, and the mask of open elements as 0 and 1: w_1 is their sum."""
        is_open = torch.gt(z, logit(self.options.threshold), out=torch.empty_like(z))
        r = z.sigmoid_()
        return r.addcmul_(r, is_open, value=-1), is_open

    def gradients(self, dslope: Tensor, dintercept: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gamma and beta."""
        dw_gamma = dslope * self.gamma + dintercept * self.beta
        dgamma = dslope * self.w_gamma + dw_gamma / self.divisor
        if not self.guarded:
            dgamma -= (dw_gamma * self.w_gamma).sum() / self.divisor
        return dgamma, dintercept * self.w_gamma


def _cfe(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: CsfeOptions) -> _Cfe | None:
    if weight is None or bias is None:
        return None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gamma, beta = (values if values.dtype == dtype else values.to(dtype) for values in (weight, bias))
    divisor = gamma.sum()
    guarded = is_near_zero(divisor.item())
    if guarded:
        divisor = away_from_zero(divisor)
    w_gamma = gamma / divisor
    return _Cfe(gamma, beta, divisor, guarded, w_gamma, gamma * w_gamma, beta * w_gamma, options)


def _forward(x: Tensor, cfe: _Cfe | None, options: CsfeOptions) -> Tensor:
    """Return y of samples in the dtype of the statistics."""
    if cfe is None:
        y = _spatial_gate(x, x.mean((2, 3), keepdim=True), options).mul_(x)
    else:
        means = x.mean((2, 3), keepdim=True) if options.with_sfe else None
        w2, is_open = cfe.gate(cfe.logits(x, means)[1])
        keep = is_open if means is None else _spatial_gate(x, means, options).add_(is_open)
        weak = w2.mul_(x)
        y = torch.addcmul(weak, x, keep, out=is_open)
        (y_1, y_2), (weak_1, weak_2) = y.chunk(2, 1), weak.chunk(2, 1)
        y_1.add_(weak_2)
        y_2.add_(weak_1)
    return y if options.scale == 1 else y.mul_(options.scale)


def _backward(
    dy: Tensor, x: Tensor, cfe: _Cfe | None, options: CsfeOptions, with_x: bool, with_parameters: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `x`, and of CFE's slope and intercept, summed over these samples."""
    if options.scale != 1:
        dy = dy * options.scale
    means = x.mean((2, 3), keepdim=True) if options.with_sfe else None
    dx = keep = dslope = dintercept = None
    if means is not None and with_x:
        keep, dx = _spatial_gradient(dy, x, means, options)
    if cfe is not None:
        centred, z, mean, inverse_std = cfe.logits(x, means)
        w2, is_open = cfe.gate(z)
        dz = _times_both_halves(x, dy)
        _sigmoid_backward(dz, w2, grad_input=dz)  # where the gate is open, w2 is 0, and so is dz
        samples, channels, height, width = x.shape
        sizes = samples, channels, height * width, options.num_groups
        asked = [with_x, with_parameters, with_parameters]
        found = _group_norm_backward(dz.view(centred.shape), centred, mean, inverse_std, cfe.slope, *sizes, asked)
        dcentred, dslope, dintercept = found
        if with_x:
            dcentred = dcentred.view(x.shape)
            dx = dcentred if dx is None else dx.add_(dcentred)
            (dx_1, dx_2), (dy_1, dy_2), (w2_1, w2_2) = dx.chunk(2, 1), dy.chunk(2, 1), w2.chunk(2, 1)
            dx_1.addcmul_(dy_2, w2_1)
            dx_2.addcmul_(dy_1, w2_2)
            w1 = w2.add_(is_open)
            keep = w1 if keep is None else keep.add_(w1)
    if dx is not None and keep is not None:
        dx.addcmul_(dy, keep)
    return dx, dslope, dintercept


def _times_both_halves(x: Tensor, dy: Tensor) -> Tensor:
    """Return x times the sum of dy and of dy with its two halves of the channels exchanged."""
    samples, channels, height, width = x.shape
    first, second = dy.chunk(2, 1)
    return (x.view(samples, 2, channels // 2, height, width) * (first + second).unsqueeze(1)).view(x.shape)


def _spatial_gate(x: Tensor, means: Tensor, options: CsfeOptions) -> Tensor:
    """Return the gate of eq. (9), from x and the means of its channels."""
    d = _deviations(x, means).square_()
    return d.div_(_four_variances(d, options)).add_(options.beta).sigmoid_()


def _spatial_gradient(dy: Tensor, x: Tensor, means: Tensor, options: CsfeOptions) -> tuple[Tensor, Tensor]:
    """Return the gate of eq. (9), and the gradient of x that passes through it."""
    u = _deviations(x, means)
    d = u.square()
    four_variances = _four_variances(d, options)
    ratio = d.div_(four_variances)  # the score less beta
    gate = (ratio + options.beta).sigmoid_()
    dratio = dy * x
    _sigmoid_backward(dratio, gate, grad_input=dratio)
    through_variance = ratio.mul_(dratio).sum((2, 3), keepdim=True).mul_(4 / _divisor(x, options))
    du = dratio.sub_(through_variance).mul_(2 / four_variances).mul_(u)
    return gate, du.sub_(du.mean((2, 3), keepdim=True))


def _deviations(x: Tensor, means: Tensor) -> Tensor:
    """Return x less the means of its channels.

    The means are rounded, which matters where they are large next to the deviations: their own mean is subtracted too.
    """
    u = x - means
    return u.sub_(u.mean((2, 3), keepdim=True))


def _four_variances(d: Tensor, options: CsfeOptions) -> Tensor:
    """Return the divisor in eq. (8), (N, C, 1, 1), from the squared deviations."""
    return d.sum((2, 3), keepdim=True).div_(_divisor(d, options)).add_(options.lambd).mul_(4)


def _divisor(x: Tensor, options: CsfeOptions) -> int:
    return max(x.shape[2] * x.shape[3] - options.correction, 1)
