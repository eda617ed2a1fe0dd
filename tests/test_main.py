"""`python -m kfde_layers` says what is there, and what "auto" really takes."""

import re

import pytest
import timm
import torch

import kfde_layers
from kfde_layers import CFE, CSFE, MFDF, SFE, __main__
from tests.support.agreement import count_operations

LAYERS = {"CFE": CFE, "SFE": SFE, "CSFE": CSFE, "MFDF": MFDF}


@pytest.fixture
def report(capsys):
    __main__.main()
    return capsys.readouterr().out


def test_versions_devices_and_models(report):
    assert f"kfde_layers {kfde_layers.__version__}\n" in report
    for name in ("torch", "timm", "einops", "numpy"):
        assert re.search(rf"\b{name} \d+\.\d+", report)
    assert f"cpu: {torch.get_num_threads()} threads" in report
    assert report.split("models\n")[1].split() == timm.list_models("kfde_*")


def test_it_says_what_auto_takes(report):
    lines = re.findall(r"^  cpu (\w+) \((.*?)\): (.*)$", report, re.MULTILINE)
    assert len(lines) == 4
    found = set()
    for dtype, shape, choices in lines:
        x = torch.zeros(tuple(map(int, shape.split(","))), dtype=getattr(torch, dtype))
        for choice in choices.split("; "):
            *names, impl = choice.replace(",", "").split()
            found.add(impl)
            for name in names:
                layer = LAYERS[name](x.shape[1])
                counts = count_operations(lambda layer=layer, x=x: layer(x))
                fused = counts["aten::sigmoid_"] > 0 or counts["aten::conv2d"] == 1
                assert ("fused" if fused else "reference") == impl, choice
    assert found == {"fused"}


def test_it_says_why_not(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "unsupported", lambda x: "a reason")
    __main__.main()
    assert capsys.readouterr().out.count("reference, since a reason") == 4


def test_a_library_that_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "LIBRARIES", ("torch", "no-such-library"))
    __main__.main()
    assert "no-such-library is not installed" in capsys.readouterr().out


def test_other_devices_are_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    __main__.main()
    assert "meta:0: the fused implementations do not run there" in capsys.readouterr().out
