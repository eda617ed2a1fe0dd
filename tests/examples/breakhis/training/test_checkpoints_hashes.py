"""The hashes of a saved model, which say whether it is the one that a run has scored."""

import json

import pytest
import timm
from breakhis.training.checkpoints import FILES, check_checkpoint, hash_checkpoint, save_model
from safetensors.torch import load_file, save_file

HASHES = dict.fromkeys(FILES, "ab" * 32)


@pytest.fixture
def saved(tmp_path):
    save_model(timm.create_model("test_resnet", num_classes=2), tmp_path / "best", ["a", "b"], {})
    return tmp_path / "best"


def test_a_checkpoint_is_known_again(saved):
    check_checkpoint(saved, hash_checkpoint(saved))


def test_another_file_is_named(saved):
    hashes = hash_checkpoint(saved)
    weights, config = load_file(saved / "model.safetensors"), json.loads((saved / "config.json").read_text())
    save_file({name: tensor + 1 for name, tensor in weights.items()}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=f"^{saved} must be the checkpoint that its run wrote, got another model.saf"):
        check_checkpoint(saved, hashes)
    save_file(weights, saved / "model.safetensors")
    hashes |= {"model.safetensors": hash_checkpoint(saved)["model.safetensors"]}
    check_checkpoint(saved, hashes)
    (saved / "config.json").write_text(json.dumps(config | {"label_names": ["b", "a"]}))
    with pytest.raises(
        ValueError, match=f"^{saved} must be the checkpoint that its run wrote, got another config.json"
    ):
        check_checkpoint(saved, hashes)
    (saved / "config.json").unlink()
    with pytest.raises(
        ValueError, match=f"^{saved} must be the checkpoint that its run wrote, got another config.json"
    ):
        check_checkpoint(saved, hashes)


@pytest.mark.parametrize(
    "hashes",
    [
        *(None, 3, True, "ab" * 32, [], list(HASHES.values()), {}),
        *(
            HASHES | {"config.json": value}
            for value in (None, 64, "", "a", "ab" * 33, "AB" * 32, "xy" * 32, ["ab" * 32])
        ),
        {"model.safetensors": "ab" * 32},
    ],
)
def test_what_are_no_hashes_is_refused(saved, hashes):
    message = (
        rf"^best_sha256 must have 64 hexadecimal digits for each of config.json and model.safetensors of {saved}, got "
    )
    with pytest.raises(ValueError, match=message):
        check_checkpoint(saved, hashes)
