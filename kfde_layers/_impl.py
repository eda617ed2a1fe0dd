"""Which implementation of an operation runs: named by the caller, never switched behind the caller's back."""

from enum import StrEnum
from importlib.util import find_spec

import torch
from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None


class Impl(StrEnum):
    """One way to run an operation."""

    AUTO = "auto"
    """Chosen from device, dtype, layout, shape and the tracer's state."""
    REFERENCE = "reference"
    """The paper's equations; runs everywhere."""
    FUSED = "fused"
    """The fast form; raises where it cannot run."""


def resolve_impl(impl: Impl | str) -> Impl:
    """Return `impl` as an `Impl`.

    Raises:
        ValueError: `impl` names no implementation.
    """
    try:
        return Impl(impl)
    except ValueError:
        wanted = ", ".join(repr(member.value) for member in Impl)
        raise ValueError(f"impl must be one of {wanted}, got {impl!r}") from None


def unsupported(x: Tensor) -> str | None:
    """Why no fused form can run on `x`, or None."""
    if x.device.type not in ("cpu", "cuda", "meta"):
        return f"it is written for CPU and CUDA, got x on {x.device}"
    if x.is_cuda and not _HAS_TRITON:
        return "on CUDA it needs Triton, which is not installed"
    if x.is_cuda and x.dtype == torch.float64:
        return "on CUDA it computes in float32, got x in torch.float64"
    if x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"on CUDA it needs compute capability 8.0, which {torch.cuda.get_device_name(x.device)} does not have"
    if transforming():
        return "it has no rule for the transforms of torch.func and for forward-mode differentiation"
    return None


def select(impl: Impl | str, unsupported: str | None, auto: Impl = Impl.FUSED) -> Impl:
    """Choose between the reference and the fused form.

    Args:
        impl: What the caller asked for.
        unsupported: Why the fused form cannot run here, in one sentence, or None.
        auto: What "auto" prefers where both can run.

    Raises:
        NotImplementedError: impl="fused" cannot run here; the message is `unsupported`.
    """
    impl = resolve_impl(impl)
    if impl is Impl.FUSED and unsupported is not None:
        raise NotImplementedError(f"impl='fused' cannot run: {unsupported}")
    if impl is Impl.AUTO:
        return auto if unsupported is None else Impl.REFERENCE
    return impl


def tracing() -> bool:
    """Whether a compiler, an exporter or `torch.jit.trace` is recording the call and should see the mathematics."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def exporting() -> bool:
    """Whether what is recorded will run elsewhere, where there are no operators but PyTorch's."""
    # Not is_exporting(): up to torch 2.8 the compiler takes that to be true of everything it traces.
    flag: bool = torch.compiler._is_exporting_flag  # pyright: ignore[reportPrivateUsage]
    return flag or torch.jit.is_tracing()


def transforming() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, to which an operator is a closed box."""
    functorch = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
    forward_mode = torch.autograd.forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    return functorch or forward_mode
