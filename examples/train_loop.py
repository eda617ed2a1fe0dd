"""Train a small network with KFDE blocks in a plain PyTorch loop.

    python examples/train_loop.py

The images are noise, with a bright square in the upper or in the lower half; the network learns to name the half. CSFE
and MFDF are ordinary modules that keep the shape of their input, so they fit anywhere in an `nn.Sequential`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfde_layers import CSFE, MFDF


def make_batch(size: int) -> tuple[Tensor, Tensor]:
    """Draw images, (size, 3, 32, 32), and the half with the square: 0 or 1."""
    images, halves = torch.randn(size, 3, 32, 32), torch.randint(2, (size,))
    for image, half in zip(images, halves.tolist(), strict=True):
        row, column = 16 * half + int(torch.randint(8, ())), int(torch.randint(24, ()))
        image[:, row : row + 8, column : column + 8] += 0.7
    return images, halves


def make_model() -> nn.Module:
    """Make a small convolutional network with both blocks."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=4),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        CSFE(32),
        MFDF(32),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 2),
    )


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, 61):
        images, halves = make_batch(32)
        loss = F.cross_entropy(model(images), halves)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
