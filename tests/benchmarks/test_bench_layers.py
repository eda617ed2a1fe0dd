import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield runpy.run_path(str(ROOT / "benchmarks/bench_layers.py"))
    torch.set_num_threads(threads)


def test_the_textbook_forms_are_what_the_layers_compute(bench):
    for make, make_plain in bench["LAYERS"].values():
        layer, plain = make(32), make_plain(32)
        bench["same_parameters"](layer, plain)
        x = torch.randn(2, 32, 9, 7)
        assert bench["agree"](plain(x), layer(x))
        assert not bench["agree"](1.01 * plain(x), layer(x))


def test_a_quick_run_writes_its_rows(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        sys, "argv", ["bench_layers.py", "--quick", "--threads", "1", "--output", str(tmp_path / "a/b.json")]
    )
    bench["main"]()
    result = json.loads((tmp_path / "a/b.json").read_text())
    assert {"kfde_layers", "torch", "timm", "python", "device", "dtype", "rounds", "rows"} == set(result)
    assert len(result["rows"]) == len(bench["LAYERS"]) * 2 * 2
    for row in result["rows"]:
        for ratio in ("over_textbook", "over_copy"):
            assert 0 < row[ratio]["q1"] <= row[ratio]["median"] <= row[ratio]["q3"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(result["rows"])


def test_a_wrong_layer_gets_no_number(bench, monkeypatch):
    wrong = torch.nn.GroupNorm
    monkeypatch.setitem(bench["LAYERS"], "CFE", (lambda channels: wrong(16, channels), bench["LAYERS"]["CFE"][1]))
    with pytest.raises(SystemExit, match=r"CFE on .* differs from the textbook form"):
        bench["measure"]("CFE", (2, 32, 5, 5), "contiguous", False, 3, 0.001)
