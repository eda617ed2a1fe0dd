"""Which implementation of an operation runs: named by the caller, never switched behind the caller's back."""

from enum import StrEnum

import torch


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
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def transforming() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, to which an operator is a closed box."""
    if torch.compiler.is_compiling():  # the compiler takes such transforms apart by itself
        return False
    functorch = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
    forward_mode = torch.autograd.forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    return functorch or forward_mode
