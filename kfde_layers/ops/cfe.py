"""Channel-level feature enhancement, equations (1)-(5)."""

import torch
from einops import rearrange
from torch import Tensor

from kfde_layers._checks import check_floating, check_int, check_map, check_real, check_shape
from kfde_layers._impl import Impl, select, unsupported
from kfde_layers.ops.csfe_fused import fused, preferred
from kfde_layers.ops.csfe_moments import Enhancement, away_from_zero, logit
from kfde_layers.ops.formats import as_input, upcast


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
    r"""Keep what a normalised gate calls salient, and hand the rest, weakened, to the opposite half of the channels.

    \[ w_\gamma = \frac{\gamma}{\sum_i \gamma_i}, \qquad
       r = \sigma(\hat{x}\, w_\gamma), \qquad
       (w_1, w_2) = \begin{cases} (1, 0) & r > T \\ (r, r) & r \le T \end{cases} \]

    \[ x_1 = w_1 x, \quad x_2 = w_2 x, \qquad
       y = [x_1^{(1)} + x_2^{(2)},\; x_1^{(2)} + x_2^{(1)}] \]

    with \(\hat{x}\) = GroupNorm(`x`) in `num_groups` groups, \(\gamma\) = `weight` and \(\beta\) = `bias` its affine
    parameters, T = `threshold`, and \((1), (2)\) the two contiguous halves of the channels.

    Source: Cui et al., "Key Feature Dynamic Enhancement Network for Breast Cancer Pathological Image Classification",
    eqs. (1)-(5); the mathematics is that of the SRU in ScConv (Li et al., CVPR 2023). Differs from the paper in
    nothing but a guard: a sum of gamma nearer to zero than 1e-6 counts as 1e-6 with its sign (zero as positive), and
    as a constant for the gradient. The gate is a step: no gradient passes through the threshold. A change of the sign
    of the sum of gamma flips every gate.

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

    Numerics: normalisation and gate in float32 (float64 for float64 input), also under autocast; the gate compares
    logits, since in bfloat16 a sigmoid this close to 0.5 rounds to 0.5 and every gate would close. Deterministic: yes.

    Examples:
        >>> x = torch.tensor([4.0, 2.0]).reshape(1, 2, 1, 1)  # normalised: 1, so open, and -1, so r = sigmoid(-0.5)
        >>> cfe(x, torch.ones(2), torch.zeros(2), num_groups=1).flatten()  # 4 + 2 r and 2 r
        tensor([4.7551, 0.7551])
    """
    check_cfe_tensors(x, weight, bias)
    check_cfe(x.shape[1], num_groups, threshold, eps)
    if select(impl, unsupported(x), preferred(x, channel=True)) is Impl.FUSED:
        return fused(x, weight, bias, Enhancement(num_groups, threshold, eps))
    return as_input(cfe_equations(upcast(x), weight, bias, num_groups, threshold, eps), x)


def check_cfe_tensors(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Refuse a map and affine parameters that do not fit each other."""
    channels = check_floating("weight", weight).numel()
    check_shape("weight", weight, (channels,))
    check_shape("bias", bias, (channels,))
    check_map("x", x, channels)


def check_cfe(channels: int, num_groups: int, threshold: float, eps: float) -> None:
    """Refuse hyper-parameters that CFE cannot use."""
    if channels % 2:
        raise ValueError(f"channels must be even, since CFE crosses two halves of them, got {channels}")
    check_int("num_groups", num_groups, minimum=1)
    if channels % num_groups:
        raise ValueError(f"num_groups must divide channels = {channels}, got {num_groups}")
    check_real("threshold", threshold, above=0, below=1)
    check_real("eps", eps, above=0)


def cfe_gate(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, threshold: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Equations (1)-(3) up to the choice: the gate r and the mask of the open elements, both (N, C, H, W)."""
    groups = rearrange(x, "n (g c) h w -> n g c h w", g=num_groups)
    centred = groups - groups.mean(dim=(2, 3, 4), keepdim=True)
    variance = centred.square().mean(dim=(2, 3, 4), keepdim=True)
    normalized = rearrange(centred * torch.rsqrt(variance + eps), "n g c h w -> n (g c) h w")

    gamma, beta = weight.to(x.dtype), bias.to(x.dtype)
    x_hat = normalized * _per_channel(gamma) + _per_channel(beta)
    w_gamma = gamma / away_from_zero(gamma.sum())  # (1)
    z = x_hat * _per_channel(w_gamma)
    return z.sigmoid(), z > logit(threshold)  # (2), and r > T said in logits


def cfe_equations(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, threshold: float, eps: float) -> Tensor:
    """Equations (1)-(5) in the number format of `x`."""
    r, is_open = cfe_gate(x, weight, bias, num_groups, threshold, eps)
    w1 = torch.where(is_open, 1.0, r)  # (3)
    w2 = torch.where(is_open, 0.0, r)
    x1, x2 = x * w1, x * w2
    return x1 + x2.roll(x.shape[1] // 2, dims=1)  # (4)-(5): each half of x1 meets the other half of x2


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


# The same function as an operator, for tracers that do not read Python: TorchScript keeps the call, everything else
# sees through it to the mathematics.
torch.library.define(
    "kfde::cfe",
    "(Tensor x, Tensor weight, Tensor bias, int num_groups, float threshold, float eps, str impl) -> Tensor",
)


@torch.library.impl("kfde::cfe", "CompositeImplicitAutograd")
def _operator(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, threshold: float, eps: float, impl: str
) -> Tensor:
    return cfe(x, weight, bias, num_groups, threshold, eps, impl=impl)
