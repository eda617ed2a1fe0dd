"""AHoNet, with channel attention and second-order pooling on ResNet-18: the timm model `ahonet_resnet18`."""

from contextlib import nullcontext
from typing import Any

import torch
from timm.layers import EcaModule
from timm.models import DefaultCfg, register_model
from torch import Tensor, nn

from breakhis.baselines.checks import check_choice, check_int
from breakhis.baselines.trunk import TrunkNetwork, build_on_trunk, make_trunk, resnet_cfgs

__all__ = ["AHoNet", "CovariancePool"]  # register_model adds the factory


class CovariancePool(nn.Module):
    r"""Pool a map to the square root of its channels' covariance, by Newton-Schulz iterations.

    \[ \Sigma = \frac{1}{n} \sum_p (x_p - \bar x)(x_p - \bar x)^\top, \quad Y_0 = \Sigma / \operatorname{tr}\Sigma,
       \quad Z_0 = I, \quad T = \tfrac12 (3 I - Z_k Y_k), \quad Y_{k+1} = Y_k T, \quad Z_{k+1} = T Z_k \]

    The output is \(\sqrt{\operatorname{tr}\Sigma}\, Y_N\), where n is the number of positions p and N = `iterations`. A
    fixed N is a part of the definition: five iterations leave a noticeable distance to the true square root.

    Source: Li, Xie, Wang, Gao (2018), "Towards Faster Training of Global Covariance Pooling Networks by Iterative
    Matrix Square Root Normalization", CVPR. Fidelity: exact. Differs from the paper: the trace is at least 1e-12, so
    that a constant map has output 0 and a finite gradient.

    Args:
        iterations: Number of iterations.
    """

    def __init__(self, iterations: int = 5) -> None:
        super().__init__()
        self.iterations = iterations

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C (C + 1) / 2), the upper triangle with the diagonal, row by row.

        Computed in float32 or, for float64 input, in float64; also under autocast.
        """
        rows, columns = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
        # autocast does not know the meta device
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            root = self.root(covariance(x.to(torch.promote_types(x.dtype, torch.float32))))
        return root[:, rows, columns].to(x.dtype)

    def root(self, matrix: Tensor) -> Tensor:
        """Approximate the square root of positive semidefinite matrices, (B, C, C)."""
        trace = matrix.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-12)[:, None, None]
        identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        y, z = matrix / trace, identity.expand_as(matrix)
        for _ in range(self.iterations):
            step = 0.5 * (3 * identity - z @ y)
            y, z = y @ step, step @ z
        return trace.sqrt() * y

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}"


def covariance(x: Tensor) -> Tensor:
    """Compute the covariance of the channels over the positions, (B, C, C), divided by their number."""
    x = x.flatten(2)
    x = x - x.mean(2, keepdim=True)
    return x @ x.mT / x.shape[2]


class AHoNet(TrunkNetwork):
    r"""AHoNet: ResNet-18 with efficient channel attention, pooled to the square root of the covariance.

    \[ \text{logits} = W \operatorname{triu}\big(\sqrt{\operatorname{cov}(\mathrm{ReLU}(\mathrm{BN}(
       \mathrm{conv}_{1 \times 1}(f(x)))))}\big) + b \]

    with f the trunk, whose map has 512 channels and, for an image of 224 x 224 px, 14 x 14 positions; the convolution
    leaves 256 channels, so that the classifier sees 256 * 257 / 2 = 32,896 numbers. See `CovariancePool`.

    Source: Zou, Zhang, Huang, Liu (2022), International Journal of Imaging Systems and Technology 32(1): 266-279, doi
    10.1002/ima.22628.

    Fidelity: a reconstruction. The abstract names the three parts, a residual network, efficient channel attention
    without reduction of dimensions, and covariance with matrix power normalisation; each is here in its usual form.
    Wang et al. (2020), "ECA-Net", CVPR, put the attention after the second batch norm of every block. Li et al. (2018)
    reduce the channels by a 1 x 1 convolution, and keep the last stage at stride 1 without dilation.
    Unknown: the place of the attention, the reduced width, the number of iterations, the training and the split. Each
    of the first three is an argument.

    Args:
        eca: "block": attention in every block; "last": one attention after the last stage.
        eca_kernel: Size of the attention's kernel, odd; None: from the number of channels, by the rule of ECA-Net.
        last_stride: Stride of the last stage, 1 or 2; 2 leaves 7 x 7 positions.
        reduction_dim: Channels whose covariance is computed.
        iterations: Iterations of the square root.
        in_chans: Channels of the image.
        num_classes: Number of classes; 0: no classifier.
        global_pool: "cov", or "" for no pooling.
        drop_rate: Dropout before the classifier.

    Raises:
        TypeError: A count is not an integer.
        ValueError: An argument is outside its range.
    """

    pools = ("cov",)

    def __init__(
        self,
        *,
        eca: str = "block",
        eca_kernel: int | None = None,
        last_stride: int = 1,
        reduction_dim: int = 256,
        iterations: int = 5,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "cov",
        drop_rate: float = 0.0,
    ) -> None:
        check_choice("eca", eca, ("block", "last"))
        check_choice("last_stride", last_stride, (1, 2))
        check_int("reduction_dim", reduction_dim, minimum=1)
        if eca_kernel is not None and check_int("eca_kernel", eca_kernel, minimum=1) % 2 == 0:
            raise ValueError(f"eca_kernel must be odd, got {eca_kernel}")

        def make_eca(channels: int, **kwargs: Any) -> nn.Module:
            # timm's module ignores the kernel's size if it is told the channels
            return EcaModule(channels, **kwargs) if eca_kernel is None else EcaModule(kernel_size=eca_kernel, **kwargs)

        trunk = make_trunk("resnet18", in_chans, block_args={"attn_layer": make_eca if eca == "block" else None})
        first = trunk.layer4[0]
        first.conv1.stride = first.downsample[0].stride = (last_stride, last_stride)
        super().__init__(trunk, reduction_dim * (reduction_dim + 1) // 2, drop_rate)
        self.feature_info[-1]["reduction"] = 16 * last_stride
        self.eca = make_eca(self.num_features) if eca == "last" else nn.Identity()
        self.feature_info[-1]["module"] = "eca"
        self.reduce = nn.Sequential(
            nn.Conv2d(self.num_features, reduction_dim, 1, bias=False), nn.BatchNorm2d(reduction_dim), nn.ReLU()
        )
        self.iterations = check_int("iterations", iterations, minimum=1)
        self.dropout = nn.Dropout(self.drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def make_pool(self, name: str) -> nn.Module:
        """Make the pooling; "cov" is the only one."""
        return CovariancePool(self.iterations)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, H, W) to (B, 512, H / 16, W / 16), rounded up."""
        return self.eca(super().forward_features(x))

    def describe(self, x: Tensor) -> Tensor:
        """Turn the feature map, (B, 512, h, w), into (B, 32,896)."""
        return self.dropout(self.global_pool(self.reduce(x)))


# before the factory: register_model reads it when it decorates it
default_cfgs: dict[str, DefaultCfg] = resnet_cfgs("ahonet_resnet18", "resnet18")


@register_model
def ahonet_resnet18(pretrained: bool = False, **kwargs: Any) -> AHoNet:
    """AHoNet on ResNet-18; `pretrained` loads ImageNet weights into the ResNet."""
    return build_on_trunk(AHoNet, "ahonet_resnet18", pretrained, **kwargs)
