"""The rule by which impl="auto" chooses for CFE, SFE and CSFE."""

from torch import Tensor

from kfde_layers._impl import Impl, tracing

# Elements of a map on CPU, measured: on smaller maps dispatching the blocked steps costs more than they save.
_ENOUGH_WITH_CFE = 2**15
_ENOUGH_WITHOUT_CFE = 2**21  # the reference of SFE is slower only where the map leaves the cache


def auto_impl(x: Tensor, *, with_cfe: bool) -> Impl:
    """Return the implementation that "auto" takes where both can run."""
    enough = _ENOUGH_WITH_CFE if with_cfe else _ENOUGH_WITHOUT_CFE
    small = not tracing() and x.device.type == "cpu" and x.numel() < enough
    return Impl.REFERENCE if small else Impl.FUSED
