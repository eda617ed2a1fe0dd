from types import SimpleNamespace

import memory
import torch
from torch import nn

KIB = torch.zeros(256)  # of float32


def test_the_peak_counts_what_lives_at_once():
    def call():
        two = torch.cat((KIB, KIB))
        three = torch.cat((KIB, KIB, KIB))  # now 5 KiB
        del two
        one = KIB.clone()  # 4
        del three
        return (one,)  # which stays, and is not counted

    assert memory.peak_bytes(call, "cpu") == 4 * 1024


def test_the_peak_of_a_plain_copy_is_nothing():
    assert memory.peak_bytes(lambda: (KIB.clone(),), "cpu") == 0


def test_saved_for_backward_are_distinct_storages_without_parameters():
    weight = nn.Parameter(torch.ones(256))
    x = KIB.clone().requires_grad_()

    assert memory.saved_bytes(lambda: x * weight, [weight]) == 1024  # x; weight is a parameter
    assert memory.saved_bytes(lambda: x * weight, []) == 2048
    assert memory.saved_bytes(lambda: (x * weight, x[:8] * weight[:8]), [weight]) == 1024  # x once
    assert memory.saved_bytes(lambda: (x * weight).exp(), [weight]) == 2048  # and the result of exp
    assert memory.saved_bytes(lambda: x + weight, [weight]) == 0


def test_what_a_custom_function_saves_is_seen():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x * x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            return 3 * ctx.saved_tensors[1] * grad

    x = KIB.clone().requires_grad_()
    assert memory.saved_bytes(lambda: Cube.apply(x), []) == 2048


def test_the_peak_on_gpu_is_beyond_what_stood_there_and_what_is_returned(monkeypatch):
    cuda = SimpleNamespace(
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 5000,
        max_memory_allocated=lambda: 5000 + 3072,
    )
    monkeypatch.setattr(memory.torch, "cuda", cuda)
    assert memory.peak_bytes(lambda: (KIB.clone(),), "cuda") == 2048
