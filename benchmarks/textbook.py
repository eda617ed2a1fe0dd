"""The equations in plain PyTorch, written as directly as possible. The layers are measured against these."""

import torch
from torch import Tensor, nn


class CFE(nn.Module):
    """Equations (1)-(5)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(16, channels)

    def forward(self, x: Tensor) -> Tensor:
        w_gamma = (self.norm.weight / self.norm.weight.sum()).view(1, -1, 1, 1)
        r = torch.sigmoid(self.norm(x) * w_gamma)
        w1 = torch.where(r > 0.5, torch.ones_like(r), r)
        w2 = torch.where(r > 0.5, torch.zeros_like(r), r)
        x1_first, x1_second = (w1 * x).chunk(2, dim=1)
        x2_first, x2_second = (w2 * x).chunk(2, dim=1)
        return torch.cat((x1_first + x2_second, x1_second + x2_first), dim=1)


class SFE(nn.Module):
    """Equations (6)-(9)."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        d = (x - x.mean(dim=(2, 3), keepdim=True)).pow(2)
        variance = d.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(d / (4 * (variance + 1e-4)) + 0.5)


class CSFE(nn.Module):
    """CFE and SFE, summed or one after the other."""

    def __init__(self, channels: int, arrangement: str = "parallel", fusion: str = "sum") -> None:
        super().__init__()
        self.cfe = CFE(channels)
        self.sfe = SFE(channels)
        self.arrangement = arrangement
        self.fusion = fusion

    def forward(self, x: Tensor) -> Tensor:
        if self.arrangement == "cfe_sfe":
            return self.sfe(self.cfe(x))
        if self.arrangement == "sfe_cfe":
            return self.cfe(self.sfe(x))
        y = self.cfe(x) + self.sfe(x)
        return y / 2 if self.fusion == "mean" else y


class MFDF(nn.Module):
    """Equations (10)-(14), depthwise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels) for size in (1, 3, 5, 7)
        )
        hidden = max(32, channels // 16)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.stack([branch(x) for branch in self.branches], dim=1)
        p = maps.sum(dim=1).mean(dim=(2, 3))
        alpha = self.fc2(self.fc1(p)).view(x.shape[0], 4, x.shape[1]).softmax(dim=1)
        return (alpha[:, :, :, None, None] * maps).sum(dim=1)
