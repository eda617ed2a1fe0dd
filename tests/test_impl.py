import pytest

from kfde_layers._impl import Impl, resolve_impl, select, tracing


def test_names_resolve_to_implementations():
    assert [resolve_impl(name) for name in ("auto", "reference", "fused", Impl.FUSED)] == [*Impl, Impl.FUSED]
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference', 'fused', got 'fast'"):
        resolve_impl("fast")


@pytest.mark.parametrize(
    ("impl", "unsupported", "auto", "chosen"),
    [
        ("auto", None, Impl.FUSED, Impl.FUSED),
        ("auto", None, Impl.REFERENCE, Impl.REFERENCE),
        ("auto", "a reason", Impl.FUSED, Impl.REFERENCE),
        ("reference", None, Impl.FUSED, Impl.REFERENCE),
        ("reference", "a reason", Impl.FUSED, Impl.REFERENCE),
        ("fused", None, Impl.REFERENCE, Impl.FUSED),
    ],
)
def test_selection(impl, unsupported, auto, chosen):
    assert select(impl, unsupported, auto) is chosen


def test_fused_never_falls_back():
    with pytest.raises(NotImplementedError, match="impl='fused' cannot run: a reason"):
        select("fused", "a reason")


def test_eager_calls_are_not_traced():
    assert not tracing()
