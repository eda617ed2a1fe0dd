import pytest
import torch

from kfde_layers import _impl
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


@pytest.mark.parametrize(
    ("device", "dtype", "triton", "capability", "reason"),
    [
        ("mps", torch.float32, True, None, "it is written for CPU and CUDA, got x on mps"),
        ("cuda", torch.float32, False, (9, 0), "on CUDA it needs Triton, which is not installed"),
        ("cuda", torch.float64, True, (9, 0), "on CUDA it computes in float32, got x in torch.float64"),
        (
            "cuda",
            torch.float32,
            True,
            (7, 5),
            "on CUDA it needs compute capability 8.0, which An old GPU does not have",
        ),
        ("cuda", torch.bfloat16, True, (8, 0), None),
        ("cpu", torch.float64, False, None, None),
    ],
)
def test_where_it_runs(monkeypatch, device, dtype, triton, capability, reason):
    class TensorOnDevice:
        is_cuda = device == "cuda"

    x = TensorOnDevice()
    x.device, x.dtype = torch.device(device), dtype
    monkeypatch.setattr(_impl, "_HAS_TRITON", triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An old GPU")
    assert _impl.unsupported(x) == reason
