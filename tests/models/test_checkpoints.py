import logging

import pytest
import timm
import torch
from timm.models import save_for_hf

from kfde_layers.testing import scatter_parameters
from tests.support.checkpoints import SIDE, backbone_and_kfde, load_pretrained, save_weights
from tests.support.inputs import images


def test_a_backbone_checkpoint_leaves_only_kfde_fresh(tmp_path, caplog):
    backbone, _ = backbone_and_kfde()
    with caplog.at_level(logging.INFO, logger="kfde_layers"):
        model = load_pretrained(
            "kfde_convnextv2_atto", save_weights(backbone, tmp_path / "backbone.pth"), identity_start=True
        )
    assert torch.equal(model(images(SIDE)), backbone(images(SIDE)))
    (record,) = (record for record in caplog.records if record.name.startswith("kfde_layers"))
    fresh = record.getMessage().split(": ")[1].split(", ")
    assert fresh == [key for key in model.state_dict() if ".kfde." in key]


def test_a_backbone_checkpoint_loads_for_other_classes_channels_and_features(tmp_path):
    backbone, _ = backbone_and_kfde()
    overlay = save_weights(backbone, tmp_path / "backbone.pth")
    model = load_pretrained("kfde_convnextv2_atto", overlay, num_classes=8, in_chans=1, identity_start=True)
    assert model(images(SIDE, channels=1)).shape == (2, 8)
    state = backbone.state_dict()
    for key, value in model.state_dict().items():
        if ".kfde." not in key and not key.startswith(("head.fc.", "stem.0.weight")):
            assert torch.equal(value, state[key]), key
    torch.testing.assert_close(model.stem[0].weight, backbone.stem[0].weight.sum(dim=1, keepdim=True))
    headless = load_pretrained("kfde_convnextv2_atto", overlay, num_classes=0, identity_start=True)
    torch.testing.assert_close(
        headless(images(SIDE)), backbone.forward_head(backbone.forward_features(images(SIDE)), pre_logits=True)
    )
    features = load_pretrained("kfde_convnextv2_atto", overlay, features_only=True, identity_start=True)
    torch.testing.assert_close(features(images(SIDE))[-1], backbone.forward_features(images(SIDE)))


def test_self_supervised_weights_have_no_head(tmp_path):
    backbone, _ = backbone_and_kfde()
    headless = {key: None for key in backbone.state_dict() if key.startswith("head.")}
    overlay = save_weights(backbone, tmp_path / "fcmae.pth", **headless)
    for kwargs in ({}, {"num_classes": 8}):
        model = load_pretrained("kfde_convnextv2_atto.fcmae", overlay, identity_start=True, **kwargs)
        torch.testing.assert_close(model.forward_features(images(SIDE)), backbone.forward_features(images(SIDE)))
    with pytest.raises(RuntimeError, match=r"Missing keys: stem\.0\.weight\. Unexpected: none"):
        load_pretrained(
            "kfde_convnextv2_atto.fcmae",
            save_weights(backbone, tmp_path / "x.pth", **headless, **{"stem.0.weight": None}),
        )


def test_half_a_head_is_not_taken_for_none(tmp_path):
    overlay = save_weights(backbone_and_kfde()[0], tmp_path / "half.pth", **{"head.norm.bias": None})
    for kwargs in ({}, {"num_classes": 8}):
        with pytest.raises(RuntimeError, match=r"Missing keys: head\.norm\.bias"):
            load_pretrained("kfde_convnextv2_atto.fcmae", overlay, **kwargs)


@pytest.mark.parametrize(
    "kwargs", [{}, {"num_classes": 8}, {"in_chans": 1}, {"num_classes": 0}, {"features_only": True}]
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages.2.blocks.1.norm.weight": None},
            r"Missing keys: stages\.2\.blocks\.1\.norm\.weight\. Unexpected: none",
        ),
        (
            {"stages.2.blocks.9.norm.weight": torch.ones(1)},
            r"Missing keys: none\. Unexpected: stages\.2\.blocks\.9\.norm\.weight",
        ),
        ({"head.norm.bias": None}, r"Missing keys: head\.norm\.bias\. Unexpected: none"),
    ],
)
def test_any_other_difference_is_refused_however_the_head_differs(tmp_path, kwargs, changes, message):
    overlay = save_weights(backbone_and_kfde()[0], tmp_path / "broken.pth", **changes)
    with pytest.raises(RuntimeError, match=message):
        load_pretrained("kfde_convnextv2_atto", overlay, **kwargs)


def test_a_missing_classifier_is_refused_where_it_would_be_used(tmp_path):
    overlay = save_weights(backbone_and_kfde()[0], tmp_path / "broken.pth", **{"head.fc.weight": None})
    with pytest.raises(RuntimeError, match=r"Missing keys: head\.fc\.weight"):
        load_pretrained("kfde_convnextv2_atto", overlay)


def test_a_kfde_checkpoint_must_be_whole(tmp_path):
    _, kfde = backbone_and_kfde()
    model = load_pretrained("kfde_convnextv2_atto", save_weights(kfde, tmp_path / "whole.pth"))
    assert torch.equal(model(images(SIDE)), kfde(images(SIDE)))
    lacking = save_weights(kfde, tmp_path / "lacking.pth", **{"stages.3.kfde.mfdf.fc1.weight": None})
    for kwargs in ({}, {"num_classes": 8}):
        with pytest.raises(RuntimeError, match=r"Missing keys: stages\.3\.kfde\.mfdf\.fc1\.weight\. Unexpected: none"):
            load_pretrained("kfde_convnextv2_atto", lacking, **kwargs)
    with pytest.raises(RuntimeError, match=r"Unexpected: stages\.3\.kfde\.csfe\.cfe\.bias"):
        load_pretrained("kfde_convnextv2_atto", save_weights(kfde, tmp_path / "whole.pth"), csfe=False, num_classes=8)


def test_weights_in_the_authors_own_naming_load(tmp_path):
    backbone, _ = backbone_and_kfde()
    renamed = {}
    for key, value in backbone.state_dict().items():
        key = key.replace("stem.", "downsample_layers.0.").replace("conv_dw", "dwconv").replace("head.fc", "head")
        key = key.replace("mlp.fc", "pwconv").replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
        key = key.replace("head.norm", "norm").replace(".blocks.", ".")
        if ".downsample." in key:
            _, stage, _, rest = key.split(".", 3)
            key = f"downsample_layers.{stage}.{rest}"
        renamed[key] = value
    torch.save({"model": renamed}, tmp_path / "authors.pth")
    model = load_pretrained("kfde_convnextv2_atto", {"file": str(tmp_path / "authors.pth")}, identity_start=True)
    assert torch.equal(model(images(SIDE)), backbone(images(SIDE)))


def test_checkpoint_path_takes_kfde_checkpoints_only(tmp_path):
    backbone, kfde = backbone_and_kfde()
    save_weights(kfde, tmp_path / "kfde.pth")
    save_weights(backbone, tmp_path / "backbone.pth")
    model = timm.create_model("kfde_convnextv2_atto", checkpoint_path=str(tmp_path / "kfde.pth")).eval()
    assert torch.equal(model(images(SIDE)), kfde(images(SIDE)))
    with pytest.raises(RuntimeError, match=r"stages\.3\.kfde"):
        timm.create_model("kfde_convnextv2_atto", checkpoint_path=str(tmp_path / "backbone.pth"))


def test_round_trip_through_a_local_directory(tmp_path):
    args = {"csfe": {"arrangement": "sfe_cfe"}, "kfde_stages": [2, 3], "identity_start": True}
    model = scatter_parameters(timm.create_model("kfde_convnextv2_atto", num_classes=8, **args)).eval()
    save_for_hf(model, str(tmp_path), model_args=args, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images(SIDE)), model(images(SIDE)))
    other_head = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2).eval()
    torch.testing.assert_close(other_head.forward_features(images(SIDE)), model.forward_features(images(SIDE)))
