import random
import resource

import pytest
import torch
from breakhis.training.state import load_state, save_state

from tests.support.pickles import CreatesAFile

STATE = {"model": {"weight": torch.randn(3000)}, "history": [{"epoch": 1, "loss": 0.1}], "rank": None}


def test_a_state_holds_tensors_and_plain_values_and_runs_no_code(tmp_path, monkeypatch):
    assert load_state(tmp_path / "state.pt") is None
    state = {"model": {"weight": torch.randn(3)}, "history": [{"epoch": 1, "loss": 0.1}], "rank": None}
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert torch.equal(loaded["model"].pop("weight"), state["model"].pop("weight"))
    assert loaded == state
    monkeypatch.chdir(tmp_path)
    save_state(tmp_path / "state.pt", {"model": CreatesAFile()})
    with pytest.raises(Exception, match="Weights only load failed"):
        load_state(tmp_path / "state.pt")
    assert not (tmp_path / "executed").exists()


def test_every_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    content = path.read_bytes()
    places = random.Random(0).sample(range(len(content)), 200)
    for place in [0, len(content) // 2, len(content) - 40, len(content) - 1, *places]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"{path} must be a state as this script wrote it, got bytes with another"
        ):
            load_state(path)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk", b"\x80\x02}q\x00."], ids=repr)
def test_a_file_that_is_no_state_is_refused_by_name(content, tmp_path):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state.pt must be a state as this script wrote it, got "):
        load_state(tmp_path / "state.pt")


def test_a_state_that_was_cut_off_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    content = path.read_bytes()
    for length in range(0, len(content), 501):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"state.pt must be a state as this script wrote it, got "):
            load_state(path)


@pytest.mark.parametrize("state", [{"model": 1}, [1, 2], 3, {}])
def test_a_state_without_a_key_is_refused_with_its_name(state, tmp_path):
    save_state(tmp_path / "state.pt", state)
    with pytest.raises(ValueError, match=r"state.pt must be a state of this run, got none of .*history"):
        load_state(tmp_path / "state.pt", ["model", "history"])


def test_a_full_disk_is_an_error_of_the_file_system_and_keeps_the_state_of_before(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, {"epoch": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))  # a file that grows further cannot be written
    try:
        with pytest.raises(OSError, match="File too large"):
            save_state(path, STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_state(path) == {"epoch": 1}
