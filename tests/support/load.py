"""Work for threads and processes: every layer in each of its options, forward and backward."""

import torch
from torch import Tensor, nn

from tests.support.cases import OPTIONS
from tests.support.inputs import draw


def make_layers(*names: str) -> dict[str, nn.Module]:
    """Make the layers of these names, or all."""
    return {name: OPTIONS[name].make() for name in names or OPTIONS}


def step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return output and gradients."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def step_all(layers: dict[str, nn.Module]) -> list[Tensor]:
    x = draw(2, 6, 7, 5, dtype=torch.float32)
    return [tensor for layer in layers.values() for tensor in step(layer.eval(), x)]


def send_all(queue) -> None:
    """Work in a process: send the results as arrays, whose memory does not end with the process."""
    torch.set_num_threads(1)
    queue.put([tensor.numpy() for tensor in step_all(make_layers())])
