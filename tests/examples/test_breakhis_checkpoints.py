import json

import pytest
import timm
import torch
from breakhis.checkpoints import build_model, eval_transform, load_model, save_model, train_transform
from PIL import Image

from tests.helpers import needs_local_dir

pytestmark = needs_local_dir
CREATE = timm.create_model


@pytest.fixture
def created(monkeypatch):
    """The arguments of each created model; random weights stand for a download."""
    calls = []

    def create_model(name, pretrained=False, **arguments):
        calls.append(arguments | {"pretrained": pretrained})
        return CREATE(name, pretrained=pretrained and name.startswith("local-dir:"), **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    return calls


def test_a_pretrained_kfde_model_starts_at_its_backbone_and_loads_again(created, tmp_path):
    model, model_args = build_model("kfde_convnextv2_atto", num_classes=2, img_size=96, pretrained=True)
    assert created == [{"pretrained": True, "num_classes": 2, "identity_start": True}]
    save_model(model, tmp_path, ["benign", "malignant"], model_args)
    again = load_model(tmp_path)
    assert not again.training
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-nc-4.0"


def test_other_models_are_left_alone_and_own_weights_claim_no_licence(created, tmp_path):
    build_model("convnextv2_atto", num_classes=8, img_size=96, pretrained=True)
    assert created == [{"pretrained": True, "num_classes": 8}]
    model, model_args = build_model("kfde_convnextv2_atto", num_classes=8, img_size=96, pretrained=False)
    assert model_args == {}
    save_model(model, tmp_path, "abcdefgh", model_args)
    config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert not {"license", "tag", "test_input_size", "test_crop_pct"} & config.keys()
    assert config["input_size"] == [3, 96, 96]


def test_evaluation_is_deterministic_and_sees_the_whole_height():
    model, _ = build_model("kfde_convnextv2_atto", num_classes=2, img_size=46, pretrained=False)
    field = Image.new("RGB", (70, 46))
    field.paste((255, 255, 255), (0, 0, 70, 1))  # a bright first row
    field.paste((255, 255, 255), (0, 45, 70, 46))  # and last
    first, again = (eval_transform(model)(field) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (3, 46, 46)
    rows = first.mean(dim=(0, 2))
    assert rows[0] == rows[-1] == rows.max()
    assert rows[1:-1].max() < rows[0]


def test_augmentation_varies_but_hardly_zooms():
    model, _ = build_model("kfde_convnextv2_atto", num_classes=2, img_size=46, pretrained=False)
    torch.manual_seed(0)
    # A dot of 10 px in a 70 x 46 field: its share of the crop says how far the crop zooms in.
    field = Image.new("RGB", (70, 46))
    field.paste((255, 255, 255), (30, 18, 40, 28))
    transform = train_transform(model)
    shares = []
    for _ in range(40):
        crop = transform(field).mean(dim=0)
        shares.append(((crop > 0).float().mean() * 46**2 / 100).item())
    whole = [share for share in shares if share > 0.9]  # those that the border did not cut
    assert len(set(shares)) > 5
    assert max(shares) < 2.3  # 1.4 squared, and a blurred edge
    assert len(whole) > 20
