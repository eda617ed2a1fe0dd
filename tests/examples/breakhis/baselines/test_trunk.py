import pytest
import timm
import torch
from breakhis.baselines.trunk import make_trunk
from safetensors.torch import save_file

from tests.support.baselines import make_small


@pytest.fixture
def weights(tmp_path):
    """Return a function that saves a model's weights and returns an overlay that makes timm load them."""

    def save(model):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file(model.state_dict(), path)
        return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}

    return save


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(1)
    return timm.create_model("resnet18")


@pytest.mark.parametrize("num_classes", [3, 1000])
def test_weights_of_the_backbone_fill_the_trunk_alone(resnet18, weights, num_classes):
    model = make_small("ahonet", num_classes=num_classes, **weights(resnet18))
    fresh = make_small("ahonet", num_classes=num_classes).state_dict()
    given = {f"trunk.{key}": tensor for key, tensor in resnet18.state_dict().items()}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, given.get(key, fresh[key])), key


def test_weights_of_colour_images_are_adapted_to_grey_ones(resnet18, weights):
    model = make_small("ahonet", in_chans=1, **weights(resnet18))
    torch.testing.assert_close(model.trunk.conv1.weight, resnet18.conv1.weight.sum(1, keepdim=True))


def test_weights_of_the_whole_network_fill_all_of_it(weights):
    saved = make_small("ahonet", num_classes=1000)
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(1)
    loaded = make_small("ahonet", num_classes=1000, **weights(saved))
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[key]), key


@pytest.mark.parametrize("name", ["resnet34", "resnet10t"])
def test_weights_of_another_backbone_are_refused(weights, name):
    arguments = weights(timm.create_model(name))
    with pytest.raises(RuntimeError, match=r"weights must be those of the backbone, got \d+ other keys"):
        make_small("ahonet", **arguments)


@pytest.mark.parametrize("tag", ["a1_in1k", "tv_in1k"])
def test_every_set_of_weights_of_the_backbone_is_registered_under_its_tag(tag):
    with torch.device("meta"):
        config = timm.create_model(f"cnn_lstm_resnet50.{tag}").pretrained_cfg
    backbone = timm.models.get_pretrained_cfg(f"resnet50.{tag}")
    assert config["hf_hub_id"] == backbone.hf_hub_id == f"timm/resnet50.{tag}"
    assert config["tag"] == tag
    assert config["mean"] == backbone.mean


def test_the_usual_weights_are_those_of_the_backbone():
    for name in ("ahonet_resnet18", "cnn_lstm_resnet50", "glnet_resnet101"):
        backbone = timm.models.get_pretrained_cfg(name.rpartition("_")[2])
        assert timm.models.get_pretrained_cfg(name).hf_hub_id == backbone.hf_hub_id


def test_another_backbone_brings_its_own_configuration(weights):
    config = make_small("cnn_lstm").pretrained_cfg
    assert config["hf_hub_id"] == "timm/test_resnet.r160_in1k"
    assert config["architecture"] == "cnn_lstm_resnet50"
    assert config["mean"] == (0.5, 0.5, 0.5)
    assert (config["first_conv"], config["classifier"]) == ("trunk.conv1.0", "fc")
    backbone = timm.create_model("test_resnet")
    model = make_small("cnn_lstm", **weights(backbone))
    assert torch.equal(model.trunk.layer4[0].conv1.weight, backbone.layer4[0].conv1.weight)


def test_tokens_are_no_feature_map():
    model = make_small("glnet", backbone="test_vit")
    with pytest.raises(ValueError, match=r"backbone must return a feature map \(N, 64, H, W\), got one of shape"):
        model(torch.randn(1, 3, 160, 160))


def test_a_trunk_has_no_classifier():
    trunk = make_trunk("test_resnet", in_chans=1)
    assert trunk.num_classes == 0
    assert trunk.conv1[0].in_channels == 1
