"""The layers in timm's options for an attention layer, and timm's own training script."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import create_attn
from torchvision.utils import save_image

from kfde_layers import CFE, CSFE, MFDF, SFE
from kfde_layers.testing import scatter_parameters
from tests.support.agreement import relative_error
from tests.support.inputs import draw
from tests.support.networks import fill_zero_weights

pytestmark = pytest.mark.slow

LAYERS = {"CFE": CFE, "SFE": SFE, "CSFE": CSFE, "MFDF": MFDF}
TABLE = "timm's own slots"

ONE_BLOCK_PER_STAGE = {"layers": (1, 1, 1, 1)}

# name of the option -> a model that has it, and the arguments that put a class into it
SLOTS = {
    "ResNet, `block_args`": ("test_resnet", lambda layer: {"block_args": {"attn_layer": layer}}),
    "Res2Net, `block_args`": (
        "res2net50_48w_2s",
        lambda layer: {"block_args": {"attn_layer": layer}, **ONE_BLOCK_PER_STAGE},
    ),
    "SKNet, `block_args`": (
        "skresnet18",
        lambda layer: {"block_args": {"attn_layer": layer}, **ONE_BLOCK_PER_STAGE},
    ),
    "ByobNet, `attn_layer`": ("test_byobnet", lambda layer: {"attn_layer": layer, "attn_kwargs": {}}),
    "NFNet, `attn_layer`": ("test_nfnet", lambda layer: {"attn_layer": layer, "attn_kwargs": {}}),
    "VoVNet, `attn`": ("ese_vovnet19b_slim_dw", lambda layer: {"attn": layer}),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.cell(TABLE, "`create_attn`")
def test_create_attn_makes_the_layer(layer):
    module = scatter_parameters(create_attn(layer, 32))
    assert type(module) is layer
    reference = layer(32, impl="reference").double()
    reference.load_state_dict(module.state_dict())
    x = draw(2, 32, 5, 7)
    assert relative_error(module.double()(x), reference(x)) < 1e-12


@pytest.mark.parametrize(
    ("name", "slot", "layer"),
    [
        pytest.param(*slot, layer, id=f"{column}, {row}", marks=pytest.mark.cell(TABLE, row, column))
        for row, slot in SLOTS.items()
        for column, layer in LAYERS.items()
    ],
)
def test_a_class_in_timms_slot_gives_the_numbers_of_the_reference(name, slot, layer):
    """Compare with the reference with the same weights, in float64."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **slot(layer)).eval()
    reference = timm.create_model(name, num_classes=5, **slot(partial(layer, impl="reference"))).eval()
    placed = [module for module in model.modules() if isinstance(module, layer)]
    assert placed
    fill_zero_weights(model)
    for module in placed:
        scatter_parameters(module)
    reference.load_state_dict(model.state_dict())
    x = draw(2, 3, 64, 64, dtype=torch.float32)
    expected = reference.double()(x.double())
    assert relative_error(model(x), expected) < 1e-3  # a gate near its threshold may open in one dtype only
    assert relative_error(model.double()(x.double()), expected) < 1e-10
    model(x.double()).square().sum().backward()
    for module in placed:
        for parameter in module.parameters():
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()


@pytest.mark.cell(TABLE, "`train.py --device-modules kfde_layers`", "models")
def test_timms_training_script_runs(tmp_path):
    script = Path(os.environ.get("TIMM_SCRIPTS", "")) / "train.py"
    if not script.is_file():
        pytest.skip("timm's wheel lacks its scripts; TIMM_SCRIPTS may name the folder that holds train.py")
    for split in ("train", "validation"):
        for label, shade in (("benign", 0.2), ("malignant", 0.8)):
            for index in range(8):
                path = tmp_path / split / label / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                save_image((shade + 0.05 * draw(3, 64, 64, seed=index)).clamp(0, 1), path)
    command = (
        f"--data-dir {tmp_path} --device cpu --device-modules kfde_layers --model kfde_convnextv2_atto --num-classes 2 "
        f"--img-size 64 --batch-size 4 --epochs 1 --warmup-epochs 0 --lr 1e-3 --workers 1 --output {tmp_path}"
    )
    done = subprocess.run([sys.executable, script, *command.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (checkpoint,) = tmp_path.glob("*/last.pth.tar")
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert any(".kfde." in key for key in state)
    (summary,) = tmp_path.glob("*/summary.csv")
    header, row = summary.read_text().split()
    assert 0 < float(dict(zip(header.split(","), row.split(","), strict=True))["train_loss"]) < 1
