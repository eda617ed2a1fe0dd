"""What tests and benchmarks share: inputs, and judging a fast form by how far the reference is from the truth."""

import torch
from torch import Tensor, nn


def assert_error_budget(
    actual: Tensor, reference: Tensor, exact: Tensor, factor: float = 4.0, floor: float = 4.0, name: str = "result"
) -> None:
    r"""Fail unless `actual` is about as near to the truth as the reference is.

    \[ \max|a - e| \le f \max|r - e| + l\,\epsilon \max|e| \]

    with a = `actual`, r = `reference`, e = `exact`, f = `factor`, l = `floor`, and \(\epsilon\) the distance from one
    to the next number in the dtype of `actual`.

    Args:
        actual: What is judged.
        reference: The same from the reference, run on the same inputs in the same dtype.
        exact: The same from the reference on these inputs in float64.
        factor: How many times the error of the reference is tolerated, dimensionless.
        floor: What is tolerated on top, in units in the last place of the largest value.
        name: What to call the result where it fails.

    Raises:
        AssertionError: The error is over the budget or either is not finite, or shapes or dtypes disagree.

    Examples:
        >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> assert_error_budget(exact.float(), exact.float(), exact)
        >>> assert_error_budget(exact.float() + 1e-3, exact.float(), exact)
        Traceback (most recent call last):
        AssertionError: result: error 1.00e-03 is over the budget of 9.54e-07 (4 x 0.00e+00 of the reference + 9.54e-07)
    """
    if exact.dtype != torch.float64:
        raise AssertionError(f"{name}: exact must be float64, got {exact.dtype}")
    if actual.dtype != reference.dtype:
        raise AssertionError(f"{name}: dtype is {actual.dtype}, of the reference {reference.dtype}")
    if not actual.shape == reference.shape == exact.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (actual, reference, exact))
        raise AssertionError(f"{name}: shapes of actual, reference and exact disagree: {shapes}")
    if actual.numel() == 0:
        return
    error, tolerated = largest_error(actual, exact), largest_error(reference, exact)
    slack = floor * torch.finfo(actual.dtype).eps * float(exact.abs().max())
    budget = factor * tolerated + slack
    if not error <= budget < float("inf"):  # false also where either is NaN
        raise AssertionError(
            f"{name}: error {error:.2e} is over the budget of {budget:.2e} "
            f"({factor:g} x {tolerated:.2e} of the reference + {slack:.2e})"
        )


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """Largest distance between two tensors, in float64; NaN if there is a NaN in either."""
    return float((actual.to(torch.float64) - exact.to(torch.float64)).abs().max())


def random_tensor(
    *shape: int,
    seed: int = 0,
    mean: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Normal numbers of deviation one, the same for the same seed up to rounding in every dtype and layout.

    Args:
        shape: Of the result.
        seed: Of the generator.
        mean: Of the numbers.
        dtype: Of the result.
        device: Of the result.
        memory_format: Of the result.
    """
    generator = torch.Generator().manual_seed(seed)
    values = mean + torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(device=device, dtype=dtype).contiguous(memory_format=memory_format)


def random_affine(
    channels: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Gamma and beta of a normalisation, (channels,), away from one and zero where they would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.3 * torch.randn((2, channels), generator=generator, dtype=torch.float64)
    weight, bias = noise.to(device=device, dtype=dtype)
    return 1 + weight, bias


def scatter_parameters(module: nn.Module, deviation: float = 0.3, seed: int = 0) -> nn.Module:
    """Move every parameter off its start, where too much is zero or one to tell mistakes apart.

    Args:
        module: Changed in place, and returned.
        deviation: Of the normal numbers that are added.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(deviation * noise.to(parameter))
    return module
