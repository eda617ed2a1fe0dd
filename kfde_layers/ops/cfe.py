"""Channel-level feature enhancement, equations (1)-(5)."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from kfde_layers._checks import check_device, check_floating, check_int, check_map, check_real, check_shape
from kfde_layers._impl import Impl, select, unsupported
from kfde_layers.fused.csfe.auto import auto_impl
from kfde_layers.fused.csfe.operator import fused
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.ops.formats import as_input, upcast
from kfde_layers.ops.gate import away_from_zero, deviations, logit
from kfde_layers.ops.scripting import define_operator


def cfe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    threshold: float = 0.5,
    eps: float = 1e-5,
    *,
    impl: Impl | str = "auto",
) -> Tensor:
    r"""Keep the values above a gate's threshold; scale the others down and add them to the other channel half too.

    \[ w_\gamma = \frac{\gamma}{\sum_i \gamma_i}, \qquad
       r = \sigma(\hat{x}\, w_\gamma), \qquad
       (w_1, w_2) = \begin{cases} (1, 0) & r > T \\ (r, r) & r \le T \end{cases} \]

    \[ x_1 = w_1 x, \quad x_2 = w_2 x, \qquad
       y = [x_1^{(1)} + x_2^{(2)},\; x_1^{(2)} + x_2^{(1)}] \]

    with \(\hat{x}\) = GroupNorm(`x`) in `num_groups` groups, \(\gamma\) = `weight` and \(\beta\) = `bias` its affine
    parameters, T = `threshold`, and \((1), (2)\) the two contiguous halves of the channels.

    Source: Cui et al., "Key Feature Dynamic Enhancement Network for Breast Cancer Pathological Image Classification",
    eqs. (1)-(5); they are those of the SRU in ScConv (Li et al., CVPR 2023). Differs from the paper
    in one guard: if the sum of gamma is nearer to zero than 1e-6, it is replaced by 1e-6 with its sign (plus for zero),
    and it is then a constant for the gradient. The gate is a step: no gradient passes through the threshold. If the sum
    of gamma changes its sign, every gate flips.

    Args:
        x: Feature map, (N, C, H, W), floating point, C even.
        weight: \(\gamma\), (C,).
        bias: \(\beta\), (C,).
        num_groups: Groups of the normalisation; divides C.
        threshold: T, a probability in (0, 1).
        eps: Added to the variance of the normalisation, in units of x squared.
        impl: "auto", "fused" or "reference"; "fused" raises instead of falling back.

    Returns:
        Same shape, dtype, device and memory format as `x`.

    Raises:
        TypeError: An argument has the wrong type, or `x` is no floating-point tensor.
        ValueError: A shape or a value is out of range; the message names it.
        NotImplementedError: impl="fused" cannot run here; the message says why.

    Numerics: normalisation and gate in float32 (float64 for float64 input), also under autocast. The gate compares
    logits: in bfloat16 a sigmoid this close to 0.5 rounds to 0.5, and every gate would close. |x| may be up to 1e15,
    and its mean up to 1e6 standard deviations. Deterministic: yes.

    Examples:
        >>> x = torch.tensor([4.0, 2.0]).reshape(1, 2, 1, 1)  # normalised: 1, so open, and -1, so r = sigmoid(-0.5)
        >>> cfe(x, torch.ones(2), torch.zeros(2), num_groups=1).flatten()  # 4 + 2 r and 2 r
        tensor([4.7551, 0.7551])
    """
    check_cfe_tensors("cfe: ", x, weight, bias)
    return cfe_from_options(x, weight, bias, cfe_options("cfe: ", x.shape[1], num_groups, threshold, eps), impl)


def cfe_options(prefix: str, channels: int, num_groups: int, threshold: float, eps: float) -> CsfeOptions:
    """Return CFE's hyper-parameters as Python numbers; refuse what it cannot use; messages begin with `prefix`."""
    if channels % 2:
        raise ValueError(f"{prefix}channels must be even, since CFE crosses two halves of them, got {channels}")
    num_groups = check_int(f"{prefix}num_groups", num_groups, minimum=1)
    if channels % num_groups:
        raise ValueError(f"{prefix}num_groups must divide channels = {channels}, got {num_groups}")
    threshold = check_real(f"{prefix}threshold", threshold, above=0, below=1)
    return CsfeOptions(num_groups=num_groups, threshold=threshold, eps=check_real(f"{prefix}eps", eps, above=0))


def cfe_from_options(x: Tensor, weight: Tensor, bias: Tensor, options: CsfeOptions, impl: Impl | str) -> Tensor:
    """Return CFE of checked tensors by checked hyper-parameters."""
    if select(impl, unsupported(x, lambda: (weight, bias)), auto_impl()) is Impl.FUSED:
        return fused(x, weight, bias, options)
    return as_input(cfe_equations(upcast(x), weight, bias, options.num_groups, options.threshold, options.eps), x)


def check_cfe_tensors(prefix: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Refuse a map and affine parameters that do not fit each other; messages begin with `prefix`."""
    channels = check_floating(f"{prefix}weight", weight).numel()
    check_shape(f"{prefix}weight", weight, (channels,))
    check_shape(f"{prefix}bias", bias, (channels,))
    check_map(f"{prefix}x", x, channels)
    check_device(f"{prefix}weight", weight, x)
    check_device(f"{prefix}bias", bias, x)


def cfe_gate(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, threshold: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gate r of eq. (2) and the mask of the open elements of eq. (3), both (N, C, H, W)."""
    groups = rearrange(x, "n (g c) h w -> n g c h w", g=num_groups)
    centred = deviations(groups, dim=(2, 3, 4))
    variance = centred.square().mean(dim=(2, 3, 4), keepdim=True)
    normalized = rearrange(centred / torch.sqrt(variance + eps), "n g c h w -> n (g c) h w")

    gamma, beta = weight.to(x.dtype), bias.to(x.dtype)
    x_hat = normalized * _per_channel(gamma) + _per_channel(beta)
    w_gamma = gamma / away_from_zero(gamma.sum())  # (1)
    z = x_hat * _per_channel(w_gamma)
    return z.sigmoid(), z > logit(threshold)  # (2), and r > T compared in logits


def cfe_equations(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, threshold: float, eps: float) -> Tensor:
    """Return equations (1)-(5) in the dtype of `x`."""
    r, is_open = cfe_gate(x, weight, bias, num_groups, threshold, eps)
    w1 = torch.where(is_open, 1.0, r)  # (3)
    w2 = torch.where(is_open, 0.0, r)
    x1, x2 = x * w1, x * w2
    return x1 + x2.roll(x.shape[1] // 2, dims=1)  # (4)-(5): each half of x1 plus the other half of x2


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


# TorchScript does not read Python: it keeps this operator. Every other tracer sees through it to the function.
def _recorded_cfe(*arguments: Any) -> Tensor:
    return cfe(*arguments[:-1], impl=arguments[-1])


define_operator(
    "cfe(Tensor x, Tensor weight, Tensor bias, int num_groups, float threshold, float eps, str impl) -> Tensor",
    _recorded_cfe,
)
