"""Choose the implementation of an operation. The caller names it; "fused" never becomes another one."""

from collections.abc import Callable, Iterable
from enum import StrEnum
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

_HAS_TRITON = find_spec("triton") is not None


class Impl(StrEnum):
    """One way to run an operation."""

    AUTO = "auto"
    """Chosen from device, dtype, layout, shape and the tracer's state."""
    REFERENCE = "reference"
    """The paper's equations; runs everywhere."""
    FUSED = "fused"
    """The fused implementation; raises where it cannot run."""


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


def unsupported(x: Tensor, parameters: Callable[[], Iterable[Tensor | None]] = tuple) -> str | None:
    """Return why no fused implementation can run on `x`, in one sentence, or None.

    `parameters` returns the parameters that it would read. It is called only during forward-mode differentiation.
    """
    if x.device.type == "cpu" and forward_ad._current_level < 0 and not transforming():  # pyright: ignore[reportPrivateUsage]
        return None  # soon, since the rest takes longer than a step on a small map
    if x.device.type not in ("cpu", "cuda", "meta"):
        return f"it is written for CPU and CUDA, got x on {x.device}"
    if x.is_cuda and not _HAS_TRITON:
        return "on CUDA it needs Triton, which is not installed"
    if x.is_cuda and x.dtype == torch.float64:
        return "on CUDA it computes in float32, got x in torch.float64"
    if x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"on CUDA it needs compute capability 8.0, which {torch.cuda.get_device_name(x.device)} does not have"
    if _inside_jvp() or _has_tangent(x, parameters):
        return "it has no rule for forward-mode differentiation, nor for torch.func in a compiled function"
    return None


def select(impl: Impl | str, unsupported: str | None, auto: Impl = Impl.FUSED) -> Impl:
    """Choose between the reference and the fused implementation.

    Args:
        impl: What the caller asked for.
        unsupported: Why the fused implementation cannot run here, in one sentence, or None.
        auto: The implementation that "auto" takes where both can run.

    Raises:
        NotImplementedError: impl="fused" cannot run here; the message is `unsupported`.
    """
    if impl == Impl.AUTO:
        return auto if unsupported is None else Impl.REFERENCE
    impl = resolve_impl(impl)
    if impl is Impl.FUSED and unsupported is not None:
        raise NotImplementedError(f"impl='fused' cannot run: {unsupported}")
    return impl


def tracing() -> bool:
    """Return whether a compiler, an exporter or `torch.jit.trace` records the call."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def exporting() -> bool:
    """Return whether an exporter records a graph that must not contain this package's operators."""
    # Not is_exporting(): up to torch 2.8 it is also true in everything that the compiler traces.
    flag: bool = torch.compiler._is_exporting_flag  # pyright: ignore[reportPrivateUsage]
    return flag or torch.jit.is_tracing()


def transforming() -> bool:
    """Return whether `torch.func` transforms the call."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]


def _inside_jvp() -> bool:
    """Return whether one of the transforms may be `torch.func.jvp`, which cannot see into an operator."""
    if not transforming():
        return False
    if torch.compiler.is_compiling():  # which cannot look at the transforms
        return True
    return any(interpreter.key() == TransformType.Jvp for interpreter in retrieve_all_functorch_interpreters())


def _has_tangent(x: Tensor, parameters: Callable[[], Iterable[Tensor | None]]) -> bool:
    """Return whether a tensor has a tangent of forward-mode differentiation, which cannot see into an operator.

    Its level belongs to the process: another thread may have entered it.
    """
    if forward_ad._current_level < 0:  # pyright: ignore[reportPrivateUsage]
        return False
    if torch.compiler.is_compiling():  # which cannot look at the tensors
        return True
    tensors = (x, *(parameter for parameter in parameters() if parameter is not None))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
