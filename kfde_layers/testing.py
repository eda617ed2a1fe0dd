"""Inputs and comparisons for tests and benchmarks. The reference's own error is the budget of the fused one."""

import torch
from torch import Tensor, nn


def assert_error_budget(
    actual: Tensor, reference: Tensor, exact: Tensor, factor: float = 4.0, floor: float = 4.0, name: str = "result"
) -> None:
    r"""Fail unless `actual` is about as near to the exact result as the reference is.

    \[ \max|a - e| \le f \max|r - e| + l\,\epsilon \max|e| \]

    with a = `actual`, r = `reference`, e = `exact`, f = `factor`, l = `floor`, and \(\epsilon\) the distance from one
    to the next larger number in the dtype of `actual`.

    Args:
        actual: Result to be judged.
        reference: Result of the reference, on the same inputs in the same dtype.
        exact: Result of the reference, on the same inputs in float64.
        factor: Factor by which the error may exceed that of the reference, dimensionless.
        floor: Error allowed in addition, in units in the last place of the largest value.
        name: Name of the result in the error message.

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
        raise AssertionError(
            f"{name}: actual and reference must have the same dtype, got {actual.dtype} and {reference.dtype}"
        )
    if not actual.shape == reference.shape == exact.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (actual, reference, exact))
        raise AssertionError(f"{name}: actual, reference and exact must have the same shape, got {shapes}")
    if actual.numel() == 0:
        return
    error, reference_error = largest_error(actual, exact), largest_error(reference, exact)
    allowance = floor * torch.finfo(actual.dtype).eps * float(exact.abs().max())
    budget = factor * reference_error + allowance
    if not error <= budget < float("inf"):  # false also where either is NaN
        raise AssertionError(
            f"{name}: error {error:.2e} is over the budget of {budget:.2e} "
            f"({factor:g} x {reference_error:.2e} of the reference + {allowance:.2e})"
        )


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """Return the largest distance between two tensors, in float64; NaN if one of them holds a NaN."""
    return float((actual.to(torch.float64) - exact.to(torch.float64)).abs().max())


def random_tensor(
    *shape: int,
    seed: int = 0,
    mean: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Return normal numbers of deviation one; the same seed gives the same numbers, rounded, in every dtype and layout.

    Args:
        shape: Shape of the result.
        seed: Seed of the generator.
        mean: Mean of the numbers.
        dtype: Dtype of the result.
        device: Device of the result.
        memory_format: Memory format of the result.
    """
    generator = torch.Generator().manual_seed(seed)
    values = mean + torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(device=device, dtype=dtype).contiguous(memory_format=memory_format)


def random_affine(
    channels: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return gamma and beta of a normalisation, (channels,), away from one and zero, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.3 * torch.randn((2, channels), generator=generator, dtype=torch.float64, device="cpu")
    weight, bias = noise.to(device=device, dtype=dtype)
    return 1 + weight, bias


def scatter_parameters(module: nn.Module, deviation: float = 0.3, seed: int = 0) -> nn.Module:
    """Add noise to every parameter, since a start of zeros and ones would hide mistakes.

    Args:
        module: Module, changed in place and returned.
        deviation: Standard deviation of the noise.
        seed: Seed of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
            parameter.add_(deviation * noise.to(parameter))
    return module
