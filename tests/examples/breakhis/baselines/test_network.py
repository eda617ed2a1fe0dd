"""What every compared system promises to timm, to the trainer and to Grad-CAM."""

import pytest
import timm
import torch
from breakhis.baselines.ahonet import AHoNet
from breakhis.baselines.bhcnet import BHCNet
from breakhis.baselines.breastnet import BreastNet
from breakhis.baselines.cnn_lstm import CnnLstm
from breakhis.baselines.glnet import GLNet
from breakhis.baselines.network import init_like_keras
from breakhis.results.explain import cam_target, grad_cam
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.support.baselines import SMALL_SYSTEMS, SYSTEMS, make_small


@pytest.fixture(params=SMALL_SYSTEMS)
def case(request) -> str:
    return request.param


def run_head(model: nn.Module, images: torch.Tensor, **options) -> torch.Tensor:
    """Compute features and then the head; GLNET's tiles need the images a second time."""
    if getattr(model, "tiles", "map") == "image":
        options["regions"] = model.tile_maps(images)
    return model.forward_head(model.forward_features(images), **options)


@pytest.mark.parametrize(
    ("name", "binary", "subtype", "gmac"),
    [
        ("bhcnet_3", 195_170, 195_560, 1.38),
        ("bhcnet_6", 394_754, 395_144, 2.77),
        ("breastnet", 603_262, 604_804, 2.82),
        ("ahonet_resnet18", 11_373_926, 11_571_308, 3.34),
        ("cnn_lstm_resnet50", 25_873_986, 25_887_816, 4.20),
        ("glnet_resnet101", 44_601_410, 44_607_560, 7.85),
    ],
)
def test_parameters_and_cost(name, binary, subtype, gmac):
    with torch.device("meta"):
        counts = []
        for num_classes in (2, 8):
            model = timm.create_model(name, num_classes=num_classes).eval()
            counts.append(sum(parameter.numel() for parameter in model.parameters()))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert counts == [binary, subtype]
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=0.01)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_configuration_names_the_first_convolution_and_the_classifier(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5, in_chans=7)
    config = model.pretrained_cfg
    assert config["architecture"] == name
    assert config["input_size"] == (3, 224, 224)
    assert model.get_submodule(config["first_conv"]).in_channels == 7
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert model.get_classifier().out_features == 5


@pytest.mark.parametrize("size", [(32, 32), (46, 70), (33, 57)])
def test_images_of_any_size(case, size):
    model, images = make_small(case), torch.randn(2, 3, *size)
    features = model.forward_features(images)
    assert features.ndim == 4
    assert features.shape[:2] == (2, model.num_features)
    logits = model(images)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(run_head(model, images), logits)
    torch.testing.assert_close(model.fc(run_head(model, images, pre_logits=True)), logits)


def test_the_images_of_a_batch_do_not_mix(case):
    model, images = make_small(case), torch.randn(3, 3, 40, 40)
    order = [2, 0, 1]
    torch.testing.assert_close(model(images[order]), model(images)[order], rtol=1e-3, atol=1e-4)
    assert (model(images)[0] - model(images)[1]).abs().max() > 1e-5


def test_without_a_classifier_the_output_is_the_vector_before_it(case):
    model, images = make_small(case), torch.randn(2, 3, 32, 32)
    vector = run_head(model, images, pre_logits=True)
    assert vector.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(images), vector)
    assert make_small(case, num_classes=0)(images).shape == vector.shape
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model(images).shape == (2, 5)


def test_without_pooling_the_output_is_the_feature_map(case):
    model, images = make_small(case), torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    assert make_small(case, num_classes=0, global_pool="")(images).shape == features.shape


@pytest.mark.parametrize("case", ["bhcnet", "breastnet", "cnn_lstm", "glnet"])
def test_maximum_and_mean_pooling(case):
    images = torch.randn(2, 3, 64, 64)
    outputs = [make_small(case, global_pool=name)(images) for name in ("avg", "max", "avgmax")]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-5
    if case == "bhcnet":  # linear after the pooling
        torch.testing.assert_close(outputs[2], (outputs[0] + outputs[1]) / 2)


def test_other_numbers_of_channels(case):
    assert make_small(case, in_chans=1)(torch.randn(2, 1, 32, 32)).shape == (2, 3)


def test_two_steps_of_training_reach_every_parameter(case):
    model, reached = make_small(case).train(), set()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            if parameter.grad.any():
                reached.add(name)
        optimizer.step()
    unreached = dict(model.named_parameters()).keys() - reached
    if case == "bhcnet":  # each of its channel gates has one hidden unit here, which may be off for all images
        unreached = {name for name in unreached if ".se." not in name}
    assert not unreached


def test_grad_cam_finds_the_feature_map(case):
    model, images = make_small(case), torch.randn(2, 3, 64, 64)
    outputs = []
    model.get_submodule(cam_target(model).name).register_forward_hook(lambda *call: outputs.append(call[-1]))
    features = model.forward_features(images)
    assert torch.equal(outputs[0], features)
    cams = grad_cam(model, images, [0, 1])
    with torch.no_grad():
        model.fc.weight.neg_()
    opposite = grad_cam(model, images, [0, 1])  # with random weights, it may be that no part raises the logit
    assert cams.shape == opposite.shape == (2, *features.shape[2:])
    assert max(cams.max(), opposite.max()) > 0


def test_dropout_is_where_the_argument_says(case):
    off = {"region_drop_rate": 0.0} if case.startswith("glnet") else {}
    images = torch.randn(4, 3, 64, 64)
    for rate in (0.0, 0.5):
        model = make_small(case, drop_rate=rate, **off).train()
        features = model.forward_features(images)
        regions = {"regions": model.tile_maps(images)} if case == "glnet-tiles" else {}
        outputs = [model.forward_head(features, **regions) for _ in range(2)]
        assert torch.equal(*outputs) == (rate == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"num_classes": True}, "num_classes must be an integer, got True"),
        ({"in_chans": 0}, "in_chans must be at least 1, got 0"),
        ({"in_chans": 1.5}, r"in_chans must be an integer, got 1\.5"),
        ({"drop_rate": 1.0}, r"drop_rate must be a number from 0 to below 1, got 1\.0"),
        ({"drop_rate": "some"}, "drop_rate must be a number from 0 to below 1, got 'some'"),
        ({"global_pool": "median"}, "global_pool must be one of .*, '', got 'median'"),
        ({"global_pool": ""}, "num_classes must be 0 with global_pool '', got 3"),
    ],
)
def test_wrong_arguments_are_named(case, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_small(case, **arguments)


@pytest.mark.parametrize(
    ("system", "words"),
    [
        (BHCNet, "exact"),
        (BreastNet, "exact"),
        (AHoNet, "a reconstruction"),
        (CnnLstm, "in the spirit of"),
        (GLNet, "in the spirit of"),
    ],
)
def test_the_documentation_says_how_far_a_system_is_the_published_one(system, words):
    assert f"Fidelity: {words}" in system.__doc__
    assert "doi" in system.__doc__
    assert "Unknown: " in system.__doc__ or system is BreastNet


def test_initial_weights_are_those_of_keras():
    torch.manual_seed(0)
    layer = nn.Conv2d(50, 200, 3)
    init_like_keras(layer)
    deviation = (2 / (50 * 9)) ** 0.5
    assert layer.weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert layer.weight.abs().max() <= 2 * deviation / 0.879  # the cut, before the deviation is restored
    assert not layer.bias.any()
