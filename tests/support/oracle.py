"""The paper's equations (1)-(14) as plain NumPy loops in float64.

It shares no code with the library, so that the two can be compared as independent readings of the paper.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALLEST_GAMMA_SUM = 1e-6


def _sigmoid(value: float) -> float:
    """Return 1 / (1 + exp(-value)), written so that exp never overflows."""
    if value >= 0.0:
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) / (1.0 + math.exp(value))


def _logit(probability: float) -> float:
    """Return the inverse of the sigmoid, with its limits at 0 and 1."""
    if probability <= 0.0:
        return -math.inf
    if probability >= 1.0:
        return math.inf
    return math.log(probability / (1.0 - probability))


def group_norm(x: Array, weight: Array, bias: Array, num_groups: int, eps: float) -> Array:
    """Return the affine GroupNorm before eq. (1): biased moments over each group of channels and all positions."""
    batch, channels = x.shape[:2]
    size = channels // num_groups
    out = np.zeros(x.shape)
    for n in range(batch):
        for g in range(num_groups):
            block = x[n, g * size : (g + 1) * size]
            mean = block.sum() / block.size
            variance = ((block - mean) ** 2).sum() / block.size
            for c in range(g * size, (g + 1) * size):
                out[n, c] = (x[n, c] - mean) / math.sqrt(variance + eps) * weight[c] + bias[c]
    return out


def cfe_logits(x: Array, weight: Array, bias: Array, num_groups: int, eps: float = 1e-5) -> Array:
    """Return eqs. (1)-(2) without the sigmoid: z = x_hat * w_gamma, with x_hat the affine GroupNorm output.

    A sum of gammas nearer to zero than 1e-6 is replaced by +-1e-6, zero counting as positive.
    """
    gamma_sum = float(weight.sum())
    if abs(gamma_sum) < SMALLEST_GAMMA_SUM:
        gamma_sum = -SMALLEST_GAMMA_SUM if gamma_sum < 0.0 else SMALLEST_GAMMA_SUM
    x_hat = group_norm(x, weight, bias, num_groups, eps)
    z = np.zeros(x.shape)
    for c in range(x.shape[1]):
        w_gamma = weight[c] / gamma_sum  # (1)
        z[:, c] = x_hat[:, c] * w_gamma  # (2), inside the sigmoid
    return z


def cfe(x: Array, weight: Array, bias: Array, num_groups: int, threshold: float = 0.5, eps: float = 1e-5) -> Array:
    """Return eqs. (1)-(5): the gate r, the masks w1 and w2 on x, and the cross fusion of contiguous halves."""
    batch, channels, height, width = x.shape
    if channels % 2:
        raise ValueError(f"the partition of eq. (4) needs an even number of channels, got {channels}")
    z = cfe_logits(x, weight, bias, num_groups, eps)
    cut = _logit(threshold)
    x1 = np.zeros(x.shape)
    x2 = np.zeros(x.shape)
    for n in range(batch):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    r = _sigmoid(z[n, c, i, j])  # (2)
                    if z[n, c, i, j] > cut:  # (3), r > T compared in logits
                        w1, w2 = 1.0, 0.0
                    else:
                        w1, w2 = r, r
                    x1[n, c, i, j] = w1 * x[n, c, i, j]
                    x2[n, c, i, j] = w2 * x[n, c, i, j]
    half = channels // 2
    x1_first, x1_second = x1[:, :half], x1[:, half:]  # (4)
    x2_first, x2_second = x2[:, :half], x2[:, half:]
    return np.concatenate([x1_first + x2_second, x1_second + x2_first], axis=1)  # (5)


def sfe(x: Array, lambd: float = 1e-4, beta: float = 0.5, correction: int = 0) -> Array:
    """Return eqs. (6)-(9): each value weighted by the sigmoid of its squared deviation over four variances, plus beta.

    The divisor of the variance is H * W - correction; eq. (7) has correction 0.
    """
    batch, channels, height, width = x.shape
    out = np.zeros(x.shape)
    for n in range(batch):
        for c in range(channels):
            mu = x[n, c].sum() / (height * width)
            d = (x[n, c] - mu) ** 2  # (6)
            variance = d.sum() / (height * width - correction)  # (7)
            for i in range(height):
                for j in range(width):
                    e_inv = d[i, j] / (4.0 * (variance + lambd)) + beta  # (8)
                    out[n, c, i, j] = x[n, c, i, j] * _sigmoid(e_inv)  # (9)
    return out


def csfe(
    x: Array,
    weight: Array,
    bias: Array,
    num_groups: int,
    threshold: float = 0.5,
    lambd: float = 1e-4,
    beta: float = 0.5,
    correction: int = 0,
    eps: float = 1e-5,
    arrangement: str = "parallel",
    fusion: str = "sum",
) -> Array:
    """Return eqs. (1)-(9): both branches on x and their sum or mean, or one branch on the output of the other."""
    if arrangement == "cfe_sfe":
        return sfe(cfe(x, weight, bias, num_groups, threshold, eps), lambd, beta, correction)
    if arrangement == "sfe_cfe":
        return cfe(sfe(x, lambd, beta, correction), weight, bias, num_groups, threshold, eps)
    if arrangement != "parallel":
        raise ValueError(f"unknown arrangement {arrangement!r}")
    total = cfe(x, weight, bias, num_groups, threshold, eps) + sfe(x, lambd, beta, correction)
    if fusion == "sum":
        return total
    if fusion == "mean":
        return total / 2.0
    raise ValueError(f"unknown fusion {fusion!r}")


def conv2d(x: Array, weight: Array, bias: Array | None, dilation: int, groups: int) -> Array:
    """Return one convolution branch of eq. (10): cross-correlation, stride 1, zero padding of dilation * (k - 1) / 2.

    The weight has shape (C_out, C_in / groups, k, k), k odd; output channels are dealt to the groups in order.
    """
    batch, channels, height, width = x.shape
    out_channels, group_in, kernel = weight.shape[:3]
    group_out = out_channels // groups
    pad = dilation * (kernel - 1) // 2
    padded = np.zeros((batch, channels, height + 2 * pad, width + 2 * pad))
    padded[:, :, pad : pad + height, pad : pad + width] = x
    out = np.zeros((batch, out_channels, height, width))
    for o in range(out_channels):
        first = (o // group_out) * group_in
        for i in range(height):
            for j in range(width):
                for u in range(kernel):
                    for v in range(kernel):
                        window = padded[:, first : first + group_in, i + u * dilation, j + v * dilation]
                        out[:, o, i, j] += window @ weight[o, :, u, v]
        if bias is not None:
            out[:, o] += bias[o]
    return out


def mfdf_branch_weights(
    branches: Sequence[Array], fc1_weight: Array, fc1_bias: Array, fc2_weight: Array, fc2_bias: Array
) -> Array:
    """Return eqs. (10)-(13): the weights alpha of shape (N, K, C), a softmax over the K branches for each channel.

    Row k * C + c of fc2 belongs to branch k and channel c.
    """
    batch, channels, height, width = branches[0].shape
    num_branches = len(branches)
    total = np.zeros(branches[0].shape)
    for branch in branches:
        total += branch  # (10)
    alpha = np.zeros((batch, num_branches, channels))
    for n in range(batch):
        pooled = np.zeros(channels)
        for c in range(channels):
            pooled[c] = total[n, c].sum() / (height * width)  # (11)
        hidden = np.zeros(len(fc1_weight))
        for m in range(len(fc1_weight)):
            hidden[m] = fc1_weight[m] @ pooled + fc1_bias[m]  # (12)
        for c in range(channels):
            scores = np.zeros(num_branches)
            for k in range(num_branches):
                row = k * channels + c
                scores[k] = fc2_weight[row] @ hidden + fc2_bias[row]
            powers = np.exp(scores - scores.max())
            alpha[n, :, c] = powers / powers.sum()  # (13)
    return alpha


def mfdf(
    x: Array,
    branch_weights: Sequence[Array],
    branch_biases: Sequence[Array | None],
    fc1_weight: Array,
    fc1_bias: Array,
    fc2_weight: Array,
    fc2_bias: Array,
    dilations: Sequence[int],
    groups: int,
    post: Sequence[Callable[[Array], Array]] | None = None,
) -> Array:
    """Return eqs. (10)-(14): F_c, the sum over k of alpha_kc * X_kc, with X_k the k-th convolution of x.

    Where post is given, X_k is post[k] of the convolution (a norm or an activation; the paper has neither).
    """
    branches: list[Array] = []
    for k in range(len(branch_weights)):
        branch = conv2d(x, branch_weights[k], branch_biases[k], dilations[k], groups)
        branches.append(branch if post is None else post[k](branch))
    alpha = mfdf_branch_weights(branches, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    batch, channels, height, width = branches[0].shape
    out = np.zeros((batch, channels, height, width))
    for n in range(batch):
        for c in range(channels):
            for k in range(len(branches)):
                out[n, c] += alpha[n, k, c] * branches[k][n, c]  # (14)
    return out


def batch_norm(x: Array, mean: Array, var: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Return batch norm with the statistics per channel, as at inference (not in the paper)."""
    out = np.zeros(x.shape)
    for c in range(x.shape[1]):
        out[:, c] = (x[:, c] - mean[c]) / math.sqrt(var[c] + eps) * weight[c] + bias[c]
    return out


def relu(x: Array) -> Array:
    """Return the positive part of x (not in the paper)."""
    return np.maximum(x, 0.0)
