"""The rule by which impl="auto" chooses for CFE, SFE and CSFE."""

from kfde_layers._impl import Impl, transforming


def auto_impl() -> Impl:
    """Return the implementation that "auto" takes where both can run."""
    return Impl.REFERENCE if transforming() else Impl.FUSED  # the equations run batched, the operators one by one
