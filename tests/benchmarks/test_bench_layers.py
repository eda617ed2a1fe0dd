import sys

import pytest
import torch
from torch import nn

from benchmarks import bench_layers, candidates, common, schema, textbook
from benchmarks.agreement import agree, far_share
from benchmarks.calls import copy_parameters

SETTINGS = common.Settings("cpu", torch.float32, 3, 1, 1e-4, 0, False)
SHAPE = (2, 32, 5, 5)


class FaultySFE(nn.Module):
    """SFE with a factor on its output or its gradient."""

    def __init__(self, channels, impl="auto", output=1.0, gradient=1.0):
        super().__init__()
        self.plain = textbook.SFE(channels)
        self.output, self.gradient = output, gradient

    def forward(self, x):
        y = self.plain(x)
        return self.output * (self.gradient * y + (1 - self.gradient) * y.detach())


@pytest.fixture
def replace_sfe(monkeypatch):
    """Replace the layer SFE among the candidates."""

    def replace(make):
        monkeypatch.setitem(candidates.LAYERS, "SFE", (make, textbook.SFE))

    return replace


def is_sfe(candidate):
    return candidate.subject == "SFE"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_layers", "--threads", "1", *map(str, arguments)])
    bench_layers.main()


def measure(work, **kwargs):
    problems = common.Problems()
    rows = list(bench_layers.measure(SHAPE, "contiguous", work, SETTINGS, problems, **kwargs))
    return rows, problems


def test_the_textbook_implementations_compute_the_layers():
    for make, make_plain in candidates.LAYERS.values():
        layer, plain = make(32), make_plain(32)
        copy_parameters(layer, plain)
        x = torch.randn(2, 32, 9, 7)
        assert agree(plain(x), layer(x))
        assert not agree(1.01 * plain(x), layer(x))


def test_agreement_allows_a_few_gates_and_no_nan():
    expected = torch.ones(10_000)
    actual = expected.clone()
    actual[:9] = 2
    assert agree(actual, expected)
    actual[9:11] = torch.nan
    assert far_share(actual, expected, 1e-4) == pytest.approx(0.0011)
    assert not agree(actual, expected)
    assert not agree(expected[:1], expected)


@pytest.mark.slow
def test_a_quick_run_writes_its_rows(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--quick", "--no-compile", "--targets", "--output", tmp_path / "a/b.json")
    result = schema.load(tmp_path / "a/b.json")
    assert result["suite"] == "layers"
    assert not result["failures"]
    works = {(row["layout"], row["work"]) for row in result["rows"]}
    assert works == {(layout, work) for layout in common.LAYOUTS for work in bench_layers.WORK}
    printed = capsys.readouterr().out
    for layout, work in sorted(works):
        rows = [row for row in result["rows"] if (row["layout"], row["work"]) == (layout, work)]
        names = {(row["subject"], row["candidate"]) for row in rows}
        assert names >= {(layer, name) for layer in candidates.LAYERS for name in ("auto", "reference", "textbook")}
        assert names >= {("peer", peer) for peer in candidates.PEERS} | {("floor", "copy"), ("floor", "sigmoid")}
        assert f"{bench_layers.QUICK_SHAPE} {layout} {work}" in printed
        for row in rows:
            assert "copy" in row["over"]
            assert ("textbook" in row["over"]) == (row["subject"] in candidates.LAYERS)
            assert ("depthwise 7x7" in row["over"]) == (row["subject"] == "MFDF")
            assert (row["saved_bytes"] is not None) == (work != "forward" and row["subject"] != "floor")
    assert "| CSFE forward / textbook |" in printed


@pytest.mark.slow
def test_compiled_modules_are_timed_too(quick_compiler):
    problems = common.Problems()
    settings = common.Settings("cpu", torch.float32, 3, 2, 1e-4, 0, True)
    rows = bench_layers.measure(
        SHAPE, "contiguous", "forward", settings, problems, lambda candidate: candidate.subject == "CSFE"
    )
    row_of = {row["candidate"]: row for row in rows}
    assert not problems.failures
    assert row_of.keys() >= {"auto", "auto compiled", "textbook compiled"}
    assert len(row_of["auto"]["over"]["textbook compiled"]) == settings.repeats


def test_a_sweep_varies_one_thing_alone(monkeypatch, tmp_path):
    shapes = bench_layers.sweep_shapes()
    for shape in shapes:
        batch, channels, side, width = shape
        assert side == width
        base = bench_layers.SWEEP_BASE[:3]
        assert sum(size != base_size for size, base_size in zip((batch, channels, side), base, strict=True)) <= 1
    assert {shape[0] for shape in shapes} == set(bench_layers.SWEEP_BATCHES)
    assert {shape[1] for shape in shapes} == set(bench_layers.SWEEP_CHANNELS)
    assert {shape[2] for shape in shapes} == set(bench_layers.SWEEP_SIDES)
    run(monkeypatch, "--quick", "--sweep", "--output", tmp_path / "sweep.json")
    result = schema.load(tmp_path / "sweep.json")
    assert result["suite"] == "sweep"
    assert {row["candidate"] for row in result["rows"]} == {"auto", "textbook", "copy", "sigmoid"}


def test_a_grid_has_small_and_large_maps(monkeypatch, tmp_path, capsys):
    sizes = [set(values) for values in zip(*bench_layers.GRID, strict=True)]
    assert (min(sizes[0]), max(sizes[0])) == (1, 64)
    assert max(sizes[1]) == 2816
    assert (min(sizes[2]), max(sizes[2])) == (1, 224)
    run(monkeypatch, "--quick", "--grid", "--targets", "--output", tmp_path / "grid.json")
    result = schema.load(tmp_path / "grid.json")
    assert result["suite"] == "grid"
    assert {row["candidate"] for row in result["rows"]} == {"auto", "reference", "textbook", "copy", "sigmoid"}
    assert "| CFE / the faster implementation |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_wrong_layer_gets_no_number_and_fails_the_run(replace_sfe, monkeypatch, tmp_path, capsys):
    replace_sfe(lambda channels, impl: FaultySFE(channels, output=1.01))
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, "--quick", "--no-compile", "--output", tmp_path / "a.json")
    result = schema.load(tmp_path / "a.json")
    names = {row["candidate"] for row in result["rows"] if row["subject"] == "SFE"}
    assert names == {"textbook"}
    assert any(row["subject"] == "CSFE" for row in result["rows"])
    assert len(result["failures"]) == len(candidates.IMPLS) * 4
    assert result["failures"][0] in capsys.readouterr().out
    assert "WRONG" in result["failures"][0]


def test_a_wrong_gradient_gets_no_number(replace_sfe):
    replace_sfe(lambda channels, impl: FaultySFE(channels, gradient=1.01))
    rows, problems = measure("forward", chosen=is_sfe)
    assert not problems.failures
    rows, problems = measure("forward+backward", chosen=is_sfe)
    assert len(problems.failures) == len(candidates.IMPLS)
    assert {row["candidate"] for row in rows if row["subject"] == "SFE"} == {"textbook"}


@pytest.mark.parametrize(("error", "list_of"), [(NotImplementedError, "skipped"), (RuntimeError, "failures")])
def test_a_candidate_that_cannot_run_is_named_and_costs_the_others_nothing(replace_sfe, error, list_of):
    class Refusing(FaultySFE):
        def forward(self, x):
            raise error("not on a Tuesday\nnor on any other day")

    replace_sfe(lambda channels, impl: Refusing(channels) if impl == "fused" else FaultySFE(channels))
    rows, problems = measure("forward", chosen=is_sfe)
    messages = [f"SFE fused, {SHAPE} contiguous forward: not on a Tuesday"]
    assert vars(problems) == {"skipped": [], "failures": []} | {list_of: messages}
    assert {row["candidate"] for row in rows if row["subject"] == "SFE"} == {"textbook", "auto", "reference"}


def test_in_16_bits_layers_are_still_compared(replace_sfe):
    problems = common.Problems()
    settings = common.Settings("cpu", torch.bfloat16, 3, 1, 1e-4, 0, False)
    replace_sfe(lambda channels, impl: FaultySFE(channels, output=1.1))
    rows = list(bench_layers.measure(SHAPE, "channels_last", "forward", settings, problems))
    assert {failure.split(",")[0] for failure in problems.failures} == {f"SFE {impl}" for impl in candidates.IMPLS}
    assert {row["candidate"] for row in rows if row["subject"] == "CSFE"} >= {"auto", "reference", "textbook"}
