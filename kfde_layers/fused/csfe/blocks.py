"""CFE and CSFE on CPU for large maps: vectorised, in-place steps over blocks of the map that stay in the cache.

The steps are chosen by their cost per element. PyTorch's `where`, `masked_fill` and `var_mean` are not vectorised on
CPU: each costs as much as tens of multiplications. So the choice in eq. (3) multiplies with a mask of 0 and 1, and the
variance is computed in two steps. `sigmoid_backward` is the whole gradient of a sigmoid in one step.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kfde_layers.fused.csfe import samples
from kfde_layers.fused.csfe.moments import ChannelGate, Moments, channel_gate, moments_from_sums, spatial_root
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.ops.formats import upcast
from kfde_layers.ops.gate import away_from_zero, logit

_Index = tuple[slice, ...]
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


def forward(x: Tensor, weight: Tensor, bias: Tensor, options: CsfeOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, with the strides of the dense `x`; mean and mean_low of x as (N, 2, C); and its m2."""
    y = torch.empty_like(x)
    values, results = _parted(x), _parted(y)
    moments = _moments(values)
    gates = _Gates(moments, weight, bias, options)
    for block, (u, keep, is_open, x_buffer, y_buffer) in _Blocks(values, buffers=5):
        x_block = _upcast(values[block], x_buffer)
        y_block = results[block] if y.dtype == u.dtype else y_buffer
        gates.deviations(x_block, block, out=u)
        if options.with_sfe:
            gates.spatial(u, block, out=keep)
        weak = gates.channel(u, block, is_open, out=u).mul_(x_block)
        keep = keep.add_(is_open) if options.with_sfe else is_open
        torch.addcmul(weak, x_block, keep, out=y_block)
        y_block[:, 0].add_(weak[:, 1])
        y_block[:, 1].add_(weak[:, 0])
        if options.scale != 1:
            y_block.mul_(options.scale)
        if y_block is y_buffer:
            results[block].copy_(y_block)
    return y, *_saved(moments)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    saved: tuple[Tensor, Tensor],
    options: CsfeOptions,
    with_x: bool,
    with_parameters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `x`, and of `weight` and `bias`, that are asked for, and None for the others.

    `dy` has the strides of the dense `x`, and `saved` is what `forward` returns after y. Pass 1 writes the direct
    gradient of each element and sums the gradients of the moments. Pass 2 adds the gradient that returns through the
    moments: `u_slope * u + constant`, per channel. The gradients of the parameters need the sums alone.
    """
    mean, m2 = saved
    moments = Moments(mean[:, 0], mean[:, 1], m2, x.shape[2] * x.shape[3])
    dx = torch.empty_like(x, dtype=m2.dtype) if with_x else None
    values, upstreams = _parted(x), _parted(dy)
    gradients = None if dx is None else _parted(dx)
    gates = _Gates(moments, weight, bias, options)
    blocks = _Blocks(values, buffers=9)  # one more than are used, since the block of dx must stay in the cache too
    sums = _first_pass(values, upstreams, gradients, blocks, gates, options)
    sums = _Sums(*(total.view_as(moments.mean) for total in sums))
    dweight = dbias = None
    if with_parameters:
        dweight, dbias = _parameter_gradients(sums, moments, weight, bias, options)
    if dx is None or gradients is None:
        return None, dweight, dbias
    u_slope, constant = map(gates.parted, _through_moments(sums, moments, weight, bias, options))
    for block, (u, x_buffer, *_) in blocks:
        channels = _channels(block)
        gates.deviations(_upcast(values[block], x_buffer), block, out=u)
        gradients[block].add_(u.mul_(u_slope[channels]).add_(constant[channels]))
    return dx.to(x.dtype), dweight, dbias


class _Sums(NamedTuple):
    """Sums over the positions of each channel. dz is the gradient of z, the logit of eq. (2), times the upstream.

    de is the gradient of eq. (8) times the factor of u squared there: without it, a sum could overflow.
    """

    dz: Tensor
    """Sum of dz."""
    dzu: Tensor
    """Sum of dz u."""
    deu: Tensor
    """Sum of de u."""
    deuu: Tensor
    """Sum of de u squared."""


def _first_pass(
    values: Tensor,
    upstreams: Tensor,
    gradients: Tensor | None,
    blocks: "_Blocks",
    gates: "_Gates",
    options: CsfeOptions,
) -> _Sums:
    """Write the direct gradient of each element to `gradients`, unless that is None, and return the sums."""
    sums = _Sums(*gates.mean.new_zeros((4, *gates.mean.shape)))
    for block, (u, keep, weak, is_open, upstream, scratch, x_buffer, dy_buffer, _) in blocks:
        channels = _channels(block)
        x_block = _upcast(values[block], x_buffer)
        dy_block = _upcast(upstreams[block], dy_buffer)
        if options.scale != 1:
            dy_block = torch.mul(dy_block, options.scale, out=dy_buffer)
        dx_block = None if gradients is None else gradients[block].zero_()
        gates.deviations(x_block, block, out=u)
        keep.zero_()
        if options.with_sfe and dx_block is not None:
            gates.spatial(u, block, out=keep)
            torch.mul(x_block, dy_block, out=upstream)
            _sigmoid_backward(upstream, keep, grad_input=upstream).mul_(gates.root[channels].square()).mul_(u)  # de u
            sums.deu[channels].add_(upstream.sum(dim=3, keepdim=True))
            dx_block.add_(upstream, alpha=2)
            sums.deuu[channels].add_(upstream.mul_(u).sum(dim=3, keepdim=True))
        gates.channel(u, block, is_open, out=weak)
        dy_sum = torch.add(dy_block[:, 0], dy_block[:, 1], out=scratch[:, 0])
        torch.mul(x_block, dy_sum[:, None], out=upstream)
        # dz; where the gate is open, weak is 0, and so is dz.
        _sigmoid_backward(upstream, weak, grad_input=upstream)
        sums.dz[channels].add_(upstream.sum(dim=3, keepdim=True))
        if dx_block is not None:
            keep.add_(weak).add_(is_open)
            dx_block.add_(torch.mul(upstream, gates.slope[channels], out=scratch))
            dx_block[:, 0].addcmul_(dy_block[:, 1], weak[:, 0])
            dx_block[:, 1].addcmul_(dy_block[:, 0], weak[:, 1])
        sums.dzu[channels].add_(upstream.mul_(u).sum(dim=3, keepdim=True))
        if dx_block is not None:
            dx_block.addcmul_(dy_block, keep)
    return sums


def _through_moments(
    sums: _Sums, moments: Moments, weight: Tensor, bias: Tensor, options: CsfeOptions
) -> tuple[Tensor, Tensor]:
    """Return slope and constant of the second pass."""
    n, dtype = moments.n, moments.mean.dtype
    gamma = weight.to(dtype)
    gate = channel_gate(moments, gamma, bias.to(dtype), options)

    def group_mean(total: Tensor) -> Tensor:
        """Return the mean over group and positions of dz gamma w_gamma, or of that times x_hat."""
        grouped = (gamma * gate.w_gamma * total).unflatten(1, (options.num_groups, -1))
        return grouped.mean(dim=2, keepdim=True).expand_as(grouped).flatten(1) / n

    moment_slope = gate.inverse_std.square() * group_mean(_times_normalized(sums, gate))
    u_slope = -moment_slope
    constant = -gate.inverse_std * group_mean(sums.dz) - moment_slope * gate.mean_offset
    if options.with_sfe:
        u_slope -= 8 * spatial_root(moments, options).square() * sums.deuu / max(n - options.correction, 1)
        constant -= 2 * sums.deu / n
    return u_slope, constant


def _parameter_gradients(
    sums: _Sums, moments: Moments, weight: Tensor, bias: Tensor, options: CsfeOptions
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gamma and beta."""
    gamma, beta = weight.to(moments.mean.dtype), bias.to(moments.mean.dtype)
    gate = channel_gate(moments, gamma, beta, options)
    dzx_total, dz_total = _times_normalized(sums, gate).sum(dim=0), sums.dz.sum(dim=0)
    dw_gamma = gamma * dzx_total + beta * dz_total
    gamma_sum = gamma.sum()
    divisor = away_from_zero(gamma_sum)
    dgamma_sum = torch.where(divisor == gamma_sum, -(dw_gamma * gamma).sum() / divisor.square(), 0.0)
    dweight = (gate.w_gamma * dzx_total + dw_gamma / divisor + dgamma_sum).to(weight.dtype)
    return dweight, (gate.w_gamma * dz_total).to(bias.dtype)


def _times_normalized(sums: _Sums, gate: ChannelGate) -> Tensor:
    """Return the sum of dz times the normalised map."""
    return gate.inverse_std * (sums.dzu + gate.mean_offset * sums.dz)


class _Gates:
    """Both gates on blocks of deviations u from the channels' means."""

    def __init__(self, moments: Moments, weight: Tensor, bias: Tensor, options: CsfeOptions) -> None:
        self.mean, self.mean_low = self.parted(moments.mean), self.parted(moments.mean_low)
        self.beta = self.mean.new_tensor(options.beta)
        self.logit_threshold = logit(options.threshold)
        if options.with_sfe:
            self.root = self.parted(spatial_root(moments, options))
        gate = channel_gate(moments, weight.to(self.mean.dtype), bias.to(self.mean.dtype), options)
        self.slope, self.intercept = self.parted(gate.slope), self.parted(gate.intercept)

    def parted(self, values: Tensor) -> Tensor:
        """View (N, C) as (N, 2, C / 2, 1), to be broadcast over the positions."""
        return values.view(len(values), 2, -1, 1)

    def deviations(self, x: Tensor, block: _Index, out: Tensor) -> Tensor:
        """Write u = x - mean to `out`; the two parts of the mean are subtracted one after the other."""
        channels = _channels(block)
        return torch.sub(x, self.mean[channels], out=out).sub_(self.mean_low[channels])

    def spatial(self, u: Tensor, block: _Index, out: Tensor) -> Tensor:
        """Write the gate of eq. (9) to `out`."""
        root_score = torch.mul(u, self.root[_channels(block)], out=out)
        return torch.addcmul(self.beta, root_score, root_score, out=out).sigmoid_()

    def channel(self, u: Tensor, block: _Index, is_open: Tensor, out: Tensor) -> Tensor:
        """Write w_2 of eq. (3) to `out`, and the mask as 0 and 1 to `is_open`; w_1 is their sum."""
        channels = _channels(block)
        z = torch.mul(u, self.slope[channels], out=out).add_(self.intercept[channels])
        torch.gt(z, self.logit_threshold, out=is_open)
        r = z.sigmoid_()
        return r.addcmul_(r, is_open, value=-1)


class _Blocks:
    """The blocks of (N, parts, C / parts, H W), and buffers in the dtype of the statistics that all blocks share.

    A block is as many whole samples as fit in the cache with the buffers, or a contiguous slice of one sample.
    """

    def __init__(self, values: Tensor, buffers: int) -> None:
        largest, sample = samples.CACHE // buffers, values[0].numel()
        pieces = math.ceil(len(values) * sample / largest) if sample <= largest else len(values)
        self._samples = math.ceil(len(values) / pieces)
        self._cut = 2 if values.stride(3) == 1 else 3
        self._length = math.ceil(values.shape[self._cut] / math.ceil(sample / largest))
        self._values = values
        first = values[next(self._indices())]
        self._buffers = [upcast(torch.empty_like(first)) for _ in range(buffers)]

    def _indices(self) -> Iterator[_Index]:
        for i in range(0, len(self._values), self._samples):
            for j in range(0, self._values.shape[self._cut], self._length):
                index = [slice(i, i + self._samples), slice(None), slice(None), slice(None)]
                index[self._cut] = slice(j, j + self._length)
                yield tuple(index)

    def __iter__(self) -> Iterator[tuple[_Index, list[Tensor]]]:
        for index in self._indices():
            shape = self._values[index].shape
            if shape == self._buffers[0].shape:
                yield index, self._buffers
            else:
                size = tuple(slice(length) for length in shape)
                yield index, [buffer[size] for buffer in self._buffers]


def _upcast(block: Tensor, buffer: Tensor) -> Tensor:
    """Return the block in the dtype of the statistics: itself, or its copy in the buffer."""
    return block if block.dtype == buffer.dtype else buffer.copy_(block)


def _parted(x: Tensor, parts: int = 2) -> Tensor:
    """View (N, C, H, W) as (N, parts, C / parts, H W); CFE exchanges its two halves along dimension 1."""
    return x.flatten(2).unflatten(1, (parts, x.shape[1] // parts))


def _channels(block: _Index) -> _Index:
    """Return the index of the same block in a tensor with one entry per channel."""
    return (*block[:3], slice(None))


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `forward` returns after y."""
    return _saved(_moments(_parted(x, parts=1)))  # of SFE, C may be odd


def _saved(moments: Moments) -> tuple[Tensor, Tensor]:
    return torch.stack((moments.mean, moments.mean_low), dim=1), moments.m2


def _moments(values: Tensor) -> Moments:
    """Return the moments: first the means, so that a large mean cancels before anything is squared."""
    n = values.shape[3]
    mean = upcast(torch.zeros_like(values[..., :1]))
    u_sum, uu_sum = torch.zeros_like(mean), torch.zeros_like(mean)
    blocks = _Blocks(values, buffers=2)
    for block, (_, x_buffer) in blocks:
        mean[_channels(block)] += _upcast(values[block], x_buffer).sum(dim=3, keepdim=True) / n
    for block, (u, x_buffer) in blocks:
        torch.sub(_upcast(values[block], x_buffer), mean[_channels(block)], out=u)
        u_sum[_channels(block)] += u.sum(dim=3, keepdim=True)
        uu_sum[_channels(block)] += u.mul_(u).sum(dim=3, keepdim=True)
    return moments_from_sums(mean.flatten(1), u_sum.flatten(1), uu_sum.flatten(1), n)
