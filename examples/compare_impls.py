"""Compare the implementations of each layer: how much the outputs differ, and how long they take.

    python examples/compare_impls.py

"reference" computes the equations, "fused" is the fast implementation, and "auto" chooses between them. All three have
the same parameters and get the same input. Differences are rounding errors; times are medians over a few calls.
"""

import statistics
import timeit

import torch
from torch import nn

from kfde_layers import CFE, CSFE, MFDF, SFE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(layer: nn.Module, x: torch.Tensor) -> float:
    """Measure the median time of a call, in s."""

    def call() -> None:
        layer(x)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    call()  # warm up
    return statistics.median(timeit.repeat(call, number=1, repeat=7))


@torch.inference_mode()
def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    x = torch.randn(4, 64, 56, 56, device=DEVICE)
    for layer_class in (CFE, SFE, CSFE, MFDF):
        reference = layer_class(64, impl="reference").to(DEVICE).eval()
        y, reference_time = reference(x), seconds(reference, x)
        for impl in ("auto", "fused"):
            layer = layer_class(64, impl=impl).to(DEVICE).eval()
            layer.load_state_dict(reference.state_dict())
            difference, ratio = (layer(x) - y).abs().max(), seconds(layer, x) / reference_time
            print(f"{layer_class.__name__} {impl}: largest difference {difference:.1e}, time / reference {ratio:.2f}")


if __name__ == "__main__":
    main()
