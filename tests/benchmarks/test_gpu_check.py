import sys
from functools import partial

import candidates
import correctness
import gpu_check
import pytest
import report
import textbook
import torch
from torch import nn

import kfde_layers
from kfde_layers.testing import scatter_parameters

SHAPES = [(2, 32, 6, 6), (3, 48, 5, 7), (2, 16, 1, 1)]


class Crooked(kfde_layers.CFE):
    """CFE but for one thing."""

    def __init__(self, channels, impl="auto", fault=None):
        super().__init__(channels)
        self.fault = fault

    def forward(self, x):
        bias = 1.1 * self.bias - 0.1 * self.bias.detach() if self.fault == "gradient of bias" else self.bias
        y = kfde_layers.functional.cfe(x, self.weight, bias, self.num_groups, impl="reference")
        if self.fault == "output":
            return y.where(y < 1, 1.1 * y)
        if self.fault == "compiled" and torch.compiler.is_compiling():
            return 1.01 * y
        if self.fault == "autocast" and torch.is_autocast_enabled(x.device.type):
            return y.bfloat16().to(y.dtype)
        if self.fault == "second gradient":
            y.register_hook(lambda cotangent: cotangent.detach() if cotangent.requires_grad else None)
        return y


def forms(fault):
    return {"CFE": (partial(Crooked, fault=fault), textbook.CFE)}


def wrong(outcomes):
    return [outcome for outcome in outcomes if outcome.right is False]


def test_the_layers_are_right():
    found = list(correctness.values("cpu", "auto", SHAPES))
    assert len(found) == len(SHAPES) * 3 * 2 * len(correctness.FORMS)
    found += correctness.far_from_zero("cpu", "auto", (2, 32, 14, 14))
    found += correctness.beyond_32_bits("cpu", "auto", (3, 32, 9, 9))
    assert all(outcome.right for outcome in found), wrong(found)
    assert correctness.LARGE_SHAPE[0] * 96 * 512 * 512 > 2**31


def test_every_way_to_run_a_layer_is_right():
    few = {name: correctness.FORMS[name] for name in ("CFE", "MFDF")}
    found = list(correctness.ways_to_run("cpu", (2, 32, 6, 6), few))
    assert len(found) == 2 * 3
    assert all(outcome.right for outcome in found), wrong(found)


@pytest.mark.parametrize("fault", ["output", "gradient of bias"])
def test_a_wrong_layer_is_found(fault):
    found = list(correctness.values("cpu", "auto", [(2, 32, 6, 6)], forms(fault)))
    assert len(wrong(found)) >= 4  # float32 and float16 at least, in both layouts
    assert all(fault in outcome.detail for outcome in wrong(found))
    assert not wrong(correctness.values("cpu", "auto", [(2, 32, 6, 6)], forms(None)))


def test_a_layer_that_is_wrong_at_the_end_of_a_large_batch_is_found():
    class Short(kfde_layers.SFE):
        def forward(self, x):
            return torch.cat((super().forward(x[:-1]), x[-1:]))

    found = correctness.beyond_32_bits("cpu", "auto", (3, 32, 9, 9), {"SFE": (Short, textbook.SFE)})
    assert len(wrong(found)) == 2


@pytest.mark.parametrize(("fault", "way"), [("compiled", "compiled"), ("autocast", "under autocast")])
def test_a_layer_that_is_wrong_in_one_way_to_run_is_found(fault, way):
    found = wrong(correctness.ways_to_run("cpu", (2, 32, 6, 6), forms(fault)))
    assert [outcome.what for outcome in found] == [f"CFE (2, 32, 6, 6) {way}"]


def test_a_wrong_second_gradient_is_seen():
    found = wrong(correctness.ways_to_run("cpu", (2, 32, 6, 6), forms("second gradient")))
    assert (found[-1].what, found[-1].detail) == ("CFE (2, 32, 6, 6) second gradient", "the second gradient is wrong")


def test_what_cannot_run_is_not_called_right(capsys):
    def refuse(channels, impl):
        raise NotImplementedError("not here")

    found = correctness.values("cpu", "fused", [(2, 32, 6, 6)], {"SFE": (refuse, textbook.SFE)})
    assert gpu_check.check(found, gpu_check.Budget(100)) == ["nothing could be checked"]
    assert "not checked: SFE (2, 32, 6, 6) contiguous float32: not here" in capsys.readouterr().out


def test_checks_are_counted_and_stop_in_time(capsys):
    outcome = correctness.Outcome
    three = [outcome("a", True, ""), outcome("b", False, "far"), outcome("c", True, "")]
    assert gpu_check.check(three, gpu_check.Budget(100)) == ["b: far"]
    assert "2 checks right, 1 wrong" in capsys.readouterr().out
    assert gpu_check.check(three, gpu_check.Budget(-1)) == []
    assert "no time" in capsys.readouterr().out


def test_pieces_are_measured_while_there_is_time():
    pieces = [
        gpu_check.Piece("layers", "float32", False, ((2, 32, 5, 5), "channels_last", "forward")),
        gpu_check.Piece("models", "bfloat16", False, ("atto", (2, 3, 32, 32), "channels_last", "training")),
    ]
    layers, models = gpu_check.measure(pieces, "cpu", gpu_check.Budget(100), seed=0, rounds=3)
    assert (layers["suite"], layers["dtype"], models["suite"]) == ("layers", "float32", "models")
    assert not layers["failures"] + models["failures"]
    assert {row["subject"] for row in layers["rows"]} == {*candidates.LAYERS, "peer", "floor"}
    assert report.stem(layers) != report.stem(models)
    late, _ = gpu_check.measure(pieces, "cpu", gpu_check.Budget(-1), seed=0)
    assert late["rows"] == []
    assert late["skipped"] == ["(2, 32, 5, 5) channels_last forward: no time left"]


def test_the_plan_holds_every_gpu_row_once_and_targets_first():
    plan = gpu_check.plan("cuda")
    assert len(plan) == 2 * 4 * 2 * 2 + 3
    assert len({(piece.dtype, piece.arguments) for piece in plan}) == len(plan)
    assert all(piece.compiled for piece in plan[:3])


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu_check.main()


def test_parameters_are_moved_off_their_start():
    layer = nn.GroupNorm(2, 4)
    scatter_parameters(layer)
    assert (layer.weight != 1).all()
    assert (layer.bias != 0).all()
