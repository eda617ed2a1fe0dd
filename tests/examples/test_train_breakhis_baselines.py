"""The compared systems in the scripts that train, predict and explain."""

import pytest
import timm
import torch
import yaml
from breakhis.training.checkpoints import load_model
from predict_breakhis import main as predict
from safetensors.torch import save_file
from train_breakhis import main as train

from tests.support.baselines import SMALL_SYSTEMS
from tests.support.explained import explain
from tests.support.predictions import QUIET
from tests.support.runs import SMALL, read_rows
from tests.support.trained import assert_consistent, assert_timm_reproduces_predictions

pytestmark = pytest.mark.slow  # every test trains a model


def arguments(case: str, tree, out) -> list[str]:
    """Make the command line of a small run."""
    name, options = SMALL_SYSTEMS[case]
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    kwargs = yaml.safe_dump(options, default_flow_style=True).strip()
    run = ["--data-dir", str(tree), "--output-dir", str(out), *SMALL]
    return [*run, "--model", name, "--model-kwargs", kwargs]


@pytest.mark.parametrize("case", ["bhcnet", "breastnet", "ahonet", "cnn_lstm", "glnet", "glnet-tiles"])
def test_a_system_trains_predicts_and_is_explained(case, synthetic_tree, tmp_path, leak_checker):
    out = tmp_path / "run"
    (metrics,) = train([*arguments(case, synthetic_tree, out), "--task", "subtype"])
    assert_consistent(out, synthetic_tree, leak_checker)
    assert metrics["model"] == SMALL_SYSTEMS[case][0]
    assert_timm_reproduces_predictions(out, synthetic_tree)

    table, cams = tmp_path / "predictions.csv", tmp_path / "cams"
    command = ["--checkpoint", str(out / "best"), "--images", str(synthetic_tree), "--output", str(table)]
    assert predict([*command, "--cam-dir", str(cams), *QUIET]) == 0
    assert len(read_rows(table)) == len(list(cams.rglob("*.png"))) == 48

    code, drawn = explain(out)
    assert code == 0
    assert set(drawn) == {"cam-100X.png"}


def test_bhcnet_trains_along_the_gauss_error_function(synthetic_tree, tmp_path):
    flags = ["--gauss-error", "-3", "3", "--lr", "0.01", "--min-lr", "1e-4", "--warmup-epochs", "0"]
    (metrics,) = train([*arguments("bhcnet", synthetic_tree, tmp_path / "run"), *flags])
    assert metrics["flags"]["gauss_error"] == [-3, 3]
    assert metrics["flags"]["min_lr"] == 1e-4


def test_a_file_of_the_backbone_starts_the_trunk(synthetic_tree, tmp_path):
    """Only the classifier is trained, so the trunk of the checkpoint is still that of the file."""
    backbone = timm.create_model("resnet18")
    save_file(backbone.state_dict(), tmp_path / "resnet18.safetensors")
    start = ["--checkpoint-path", str(tmp_path / "resnet18.safetensors"), "--freeze-backbone"]
    train([*arguments("ahonet", synthetic_tree, tmp_path / "run"), *start])
    trunk = load_model(tmp_path / "run" / "best").trunk
    for name in ("conv1", "layer4"):
        for key, tensor in backbone.get_submodule(name).state_dict().items():
            assert torch.equal(trunk.get_submodule(name).state_dict()[key], tensor), key


def test_a_system_without_weights_is_refused_in_one_line(synthetic_tree, tmp_path):
    with pytest.raises(
        SystemExit, match=r"model bhcnet_3 .* cannot be built: No pretrained weights exist for bhcnet_3"
    ):
        train([*arguments("bhcnet", synthetic_tree, tmp_path / "run"), "--pretrained"])
