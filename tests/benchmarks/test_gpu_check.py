import sys
from functools import partial

import pytest
import torch
from torch import nn

import kfde_layers
from benchmarks import candidates, device_checks, gpu_check, report, textbook
from benchmarks.device_checks import Case, Outcome
from kfde_layers.testing import scatter_parameters

SHAPES = [(2, 32, 6, 6), (3, 48, 5, 7), (2, 16, 1, 1)]


class FaultyCFE(kfde_layers.CFE):
    """CFE with one fault, or none."""

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


def faulty_case(fault):
    return {"CFE": Case(partial(FaultyCFE, fault=fault), textbook.CFE)}


def failures(outcomes):
    return [outcome for outcome in outcomes if outcome.right is False]


@pytest.fixture
def quick_compiler(monkeypatch):
    """Compile without code generation: what a layer computes while it is compiled stays the same."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_the_layers_are_right():
    outcomes = list(device_checks.values("cpu", "auto", SHAPES))
    assert len(outcomes) == len(SHAPES) * 3 * 2 * len(device_checks.CASES)
    outcomes += device_checks.far_from_zero("cpu", "auto", (2, 32, 14, 14))
    outcomes += device_checks.beyond_32_bits("cpu", "auto", (3, 32, 9, 9))
    assert all(outcome.right for outcome in outcomes), failures(outcomes)
    assert device_checks.LARGE_SHAPE[0] * 96 * 512 * 512 > 2**31


@pytest.mark.slow
def test_every_way_to_run_a_layer_is_right(quick_compiler):
    cases = {name: device_checks.CASES[name] for name in ("CFE", "MFDF")}
    outcomes = list(device_checks.ways_to_run("cpu", (2, 32, 6, 6), cases))
    assert len(outcomes) == 2 * 3
    assert all(outcome.right for outcome in outcomes), failures(outcomes)


@pytest.mark.parametrize("fault", ["output", "gradient of bias"])
def test_a_wrong_layer_is_noticed(fault):
    wrong = failures(device_checks.values("cpu", "auto", [(2, 32, 6, 6)], faulty_case(fault)))
    assert len(wrong) >= 4  # float32 and float16 at least, in both layouts
    assert all(fault in outcome.detail for outcome in wrong)
    assert not failures(device_checks.values("cpu", "auto", [(2, 32, 6, 6)], faulty_case(None)))


def test_a_layer_that_is_wrong_at_the_end_of_a_large_batch_is_noticed():
    class Short(kfde_layers.SFE):
        def forward(self, x):
            return torch.cat((super().forward(x[:-1]), x[-1:]))

    outcomes = device_checks.beyond_32_bits("cpu", "auto", (3, 32, 9, 9), {"SFE": Case(Short, textbook.SFE)})
    assert len(failures(outcomes)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "way"), [("compiled", "compiled"), ("autocast", "under autocast")])
def test_a_layer_that_is_wrong_in_one_way_to_run_is_noticed(quick_compiler, fault, way):
    wrong = failures(device_checks.ways_to_run("cpu", (2, 32, 6, 6), faulty_case(fault)))
    assert [outcome.what for outcome in wrong] == [f"CFE (2, 32, 6, 6) {way}"]


def test_a_wrong_second_gradient_is_noticed(quick_compiler):
    *_, last = failures(device_checks.ways_to_run("cpu", (2, 32, 6, 6), faulty_case("second gradient")))
    assert (last.what, last.detail) == ("CFE (2, 32, 6, 6) second gradient", "the second gradient is wrong")


def test_a_check_that_cannot_run_does_not_count_as_passed(capsys):
    def refuse(channels, impl):
        raise NotImplementedError("not here")

    outcomes = device_checks.values("cpu", "fused", [(2, 32, 6, 6)], {"SFE": Case(refuse, textbook.SFE)})
    assert gpu_check.check(outcomes, gpu_check.Budget(100)) == ["nothing could be checked"]
    assert "not checked: SFE (2, 32, 6, 6) contiguous float32: not here" in capsys.readouterr().out


def test_checks_are_counted_and_stop_in_time(capsys):
    outcomes = [Outcome("a", True, ""), Outcome("b", False, "far"), Outcome("c", True, "")]
    assert gpu_check.check(outcomes, gpu_check.Budget(100)) == ["b: far"]
    assert "2 checks right, 1 wrong" in capsys.readouterr().out
    assert gpu_check.check(outcomes, gpu_check.Budget(-1)) == []
    assert "no time" in capsys.readouterr().out


@pytest.mark.slow
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
    assert len(plan) == 2 * 4 * 2 * 2 + 3 + 1
    assert len({(piece.dtype, piece.arguments) for piece in plan}) == len(plan)
    assert all(piece.compiled for piece in plan[:3])


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu_check.main()


def test_parameters_move_away_from_their_start():
    layer = nn.GroupNorm(2, 4)
    scatter_parameters(layer)
    assert (layer.weight != 1).all()
    assert (layer.bias != 0).all()
