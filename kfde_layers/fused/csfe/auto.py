"""The rule by which impl="auto" chooses for CFE, SFE and CSFE."""

from torch import Tensor

from kfde_layers._impl import Impl, tracing, transforming

# Elements of a sample on CPU, measured: on smaller maps dispatching the blocked steps costs more than they save. The
# batch is left out: a sample must not change its bits, and with them a gate near its threshold, with its company.
_ENOUGH_WITH_CFE = 2**13
_ENOUGH_WITHOUT_CFE = 2**17


def auto_impl(x: Tensor, *, with_cfe: bool) -> Impl:
    """Return the implementation that "auto" takes where both can run."""
    if transforming():  # the equations run batched, the operators' gradients one by one
        return Impl.REFERENCE
    _, channels, height, width = x.shape
    enough = _ENOUGH_WITH_CFE if with_cfe else _ENOUGH_WITHOUT_CFE
    small = not tracing() and x.device.type == "cpu" and channels * height * width < enough
    return Impl.REFERENCE if small else Impl.FUSED
