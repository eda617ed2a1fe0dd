import sys

import pytest
import torch

import kfde_layers
from benchmarks import bench_models, common, schema

SHAPE = (2, 3, 32, 32)


def measure(work, dtype=torch.float32, compiled=False):
    problems = common.Problems()
    settings = common.Settings("cpu", dtype, 3, 1, 1e-4, 0, compiled)
    return list(bench_models.measure("atto", SHAPE, "channels_last", work, settings, problems)), problems


@pytest.mark.slow
def test_a_quick_run_writes_its_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_models, "QUICK_SHAPES", [("atto", SHAPE), ("atto", (1, *SHAPE[1:]))])
    monkeypatch.setattr(
        sys, "argv", ["bench_models", "--quick", "--threads", "1", "--targets", "--output", str(tmp_path / "m.json")]
    )
    bench_models.main()
    result = schema.load(tmp_path / "m.json")
    assert result["suite"] == "models"
    assert not result["failures"]
    several = [row for row in result["rows"] if row["shape"][0] > 1]
    assert len(result["rows"]) == 2 * 2 * (3 + 1)
    assert len(several) == 2 * 2 * 3
    rows = {(row["candidate"], row["layout"], row["work"]): row for row in several}
    assert all("backbone" in row["over"] for row in result["rows"])
    of_training = rows["kfde", "contiguous", "training"]["peak_bytes"]
    assert rows["kfde", "contiguous", "inference"]["peak_bytes"] < of_training
    assert rows["kfde", "contiguous", "checkpointed training"]["peak_bytes"] < of_training
    assert "atto inference, throughput / backbone" in capsys.readouterr().out


@pytest.mark.slow
def test_16_bit_dtypes_run_under_autocast():
    rows, problems = measure("training", torch.bfloat16)
    assert {row["candidate"] for row in rows} == {"kfde", "backbone"}
    assert not problems.failures


def test_a_wrong_model_gets_no_number(monkeypatch):
    forward = kfde_layers.MFDF.forward
    monkeypatch.setattr(kfde_layers.MFDF, "forward", lambda self, x: 1.01 * forward(self, x))
    rows, problems = measure("inference")
    assert [row["candidate"] for row in rows] == ["backbone"]
    assert len(problems.failures) == 1
    assert "WRONG" in problems.failures[0]


def test_training_does_not_change_the_model():
    model = torch.nn.Linear(4, 1000)
    before = model.weight.clone()
    step = bench_models.training(model, lambda: model(torch.ones(2, 4)), torch.tensor([0, 1]))
    assert step() == ()
    assert model.weight.grad is None
    torch.testing.assert_close(model.weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("work", bench_models.WORK)
def test_only_checkpointed_training_checkpoints_and_only_training_counts_saved_memory(work, monkeypatch):
    enabled = []
    monkeypatch.setattr(
        "timm.models.convnext.ConvNeXt.set_grad_checkpointing", lambda self, enable=True: enabled.append(enable)
    )
    rows, _ = measure(work)
    assert enabled == [work == "checkpointed training"] * 2
    assert (rows[0]["saved_bytes"] is not None) == (work == "training")
