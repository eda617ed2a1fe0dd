"""Forward-mode differentiation in one thread leaves the layers in other threads as they are."""

import threading

import pytest
import torch
from torch.autograd import forward_ad

from kfde_layers import CFE, CSFE, MFDF, SFE
from kfde_layers.testing import random_tensor

X = random_tensor(2, 8, 40, 40, dtype=torch.float32)


@pytest.fixture
def level_of_another_thread():
    entered, done = threading.Event(), threading.Event()

    def enter():
        with forward_ad.dual_level():
            entered.set()
            done.wait(60)

    thread = threading.Thread(target=enter)
    thread.start()
    assert entered.wait(60)
    yield
    done.set()
    thread.join()


@pytest.mark.parametrize("impl", ["auto", "fused"])
@pytest.mark.parametrize("make", [CFE, SFE, CSFE, MFDF])
def test_the_same_bits_while_another_thread_differentiates(make, impl, request):
    layer = make(8, impl=impl)
    before = layer(X)
    request.getfixturevalue("level_of_another_thread")
    assert forward_ad._current_level >= 0
    assert torch.equal(layer(X), before)


@pytest.mark.parametrize("make", [CFE, CSFE, MFDF])
def test_a_tangent_of_any_tensor_is_seen(make):
    for name in ["x", *(name for name, _ in make(8).named_parameters())]:
        layer, x = make(8, impl="fused"), X
        with forward_ad.dual_level():
            if name == "x":
                x = forward_ad.make_dual(x, x)
            else:
                parent, _, key = name.rpartition(".")
                owner = layer.get_submodule(parent)
                parameter = getattr(owner, key).detach()
                delattr(owner, key)
                setattr(owner, key, forward_ad.make_dual(parameter, torch.ones_like(parameter)))
            with pytest.raises(NotImplementedError, match="no rule for forward-mode differentiation"):
                layer(x)
            layer.impl = "auto"
            assert forward_ad.unpack_dual(layer(x)).tangent is not None, name
