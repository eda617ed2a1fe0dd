import pytest
import torch
from breakhis.training.state import load_state, save_state

from tests.support.pickles import CreatesAFile


def test_a_state_holds_tensors_and_plain_values_and_runs_no_code(tmp_path, monkeypatch):
    assert load_state(tmp_path / "state.pt") is None
    state = {"model": {"weight": torch.randn(3)}, "history": [{"epoch": 1, "loss": 0.1}], "rank": None}
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert torch.equal(loaded["model"].pop("weight"), state["model"].pop("weight"))
    assert loaded == state
    monkeypatch.chdir(tmp_path)
    torch.save({"model": CreatesAFile()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_state(tmp_path / "state.pt")
    assert not (tmp_path / "executed").exists()
