import sys
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks import candidates, memory

KIB = torch.zeros(256)  # of float32


def test_the_peak_counts_what_lives_at_once():
    def call():
        two = torch.cat((KIB, KIB))
        three = torch.cat((KIB, KIB, KIB))  # now 5 KiB
        del two
        result = KIB.clone()  # 4
        del three
        return (result,)  # stays in memory, and is not counted

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


def test_tensors_saved_by_a_custom_function_are_counted():
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


def test_the_peak_on_gpu_counts_neither_earlier_memory_nor_the_results(monkeypatch):
    cuda = SimpleNamespace(
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 5000,
        max_memory_allocated=lambda: 5000 + 3072,
    )
    monkeypatch.setattr(memory.torch, "cuda", cuda)
    assert memory.peak_bytes(lambda: (KIB.clone(),), "cuda") == 2048


def test_the_command_prints_the_memory_of_every_layer_and_peer(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory", "--shape", "2", "32", "7", "5"])
    memory.main()
    header, _, *lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert header == ["layer", "candidate", "peak / input", "saved / input"]
    table = {(layer, candidate): (float(peak), float(saved)) for layer, candidate, peak, saved in lines}
    assert {layer for layer, _ in table} == {*candidates.LAYERS, "peer"}
    assert table["CFE", "fused"][1] < table["CFE", "textbook"][1]  # the fused one saves its input only


def test_the_command_leaves_out_candidates_that_cannot_run(monkeypatch, capsys):
    class Refusing(nn.Module):
        def forward(self, x):
            raise NotImplementedError("not here")

    refusing = candidates.Candidate("SFE", "fused", Refusing(), None)
    monkeypatch.setattr(memory, "candidates", lambda *args, **kwargs: [refusing])
    monkeypatch.setattr(sys, "argv", ["memory"])
    memory.main()
    assert "fused" not in capsys.readouterr().out
