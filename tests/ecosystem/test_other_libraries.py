"""`insert` in small networks of libraries other than timm, with random weights."""

import copy
import functools
import pickle

import pytest
import torch

from kfde_layers import CSFE, MFDF, insert, insertion_points, remove
from kfde_layers.insertion import Point
from kfde_layers.testing import scatter_parameters
from tests.support.agreement import outputs_are_equal, tensors_of
from tests.support.inputs import draw
from tests.support.networks import make_host

pytestmark = pytest.mark.slow

SIDE = 64  # px
TABLE = "Other libraries"


def torchvision(name, **kwargs):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return getattr(models, name)(num_classes=5, **kwargs)


def segmentation(encoder):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    return smp.Unet(encoder, encoder_weights=None, classes=2)


def transformers(model, config, **kwargs):
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    return getattr(library, model)(getattr(library, config)(**kwargs))


def monai(name, **kwargs):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    return getattr(nets, name)(spatial_dims=2, **kwargs)


VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}

# For each network: how to make it, and points that are known by reading its source
HOSTS = {
    "torchvision: ResNet": (
        functools.partial(torchvision, "resnet18"),
        {"layer3": Point(256, 16, "NCHW"), "layer4": Point(512, 32, "NCHW")},
    ),
    "torchvision: EfficientNet": (
        functools.partial(torchvision, "efficientnet_b0"),
        {"features.4": Point(80, 16, "NCHW"), "features.7": Point(320, 32, "NCHW")},
    ),
    "torchvision: Swin": (
        functools.partial(
            torchvision,
            "SwinTransformer",
            patch_size=[4, 4],
            embed_dim=24,
            depths=[2, 2, 2, 2],
            num_heads=[1, 2, 3, 6],
            window_size=[7, 7],
        ),
        {"features.3": Point(48, 8, "NHWC"), "features.7": Point(192, 32, "NHWC")},
    ),
    "torchvision: ViT": (
        functools.partial(
            torchvision,
            "VisionTransformer",
            image_size=SIDE,
            patch_size=32,
            num_layers=3,
            num_heads=2,
            hidden_dim=32,
            mlp_dim=64,
        ),
        {
            "encoder.layers.encoder_layer_0": Point(32, 32, "NLC", 1),
            "encoder.layers.encoder_layer_1": Point(32, 32, "NLC", 1),
        },
    ),
    "segmentation-models-pytorch: U-Net on ResNet": (
        functools.partial(segmentation, "resnet18"),
        {"encoder.layer2": Point(128, 8, "NCHW"), "encoder.layer4": Point(512, 32, "NCHW")},
    ),
    "segmentation-models-pytorch: U-Net on a timm encoder": (
        functools.partial(segmentation, "tu-convnextv2_atto"),
        {"encoder.model.stages_1": Point(80, 8, "NCHW"), "encoder.model.stages_3": Point(320, 32, "NCHW")},
    ),
    "transformers: ViT": (
        functools.partial(transformers, "ViTModel", "ViTConfig", intermediate_size=64, **VIT),
        {"layers.0": Point(32, 8, "NLC", 1), "layers.1": Point(32, 8, "NLC", 1)},
    ),
    "transformers: DINOv2 with registers, as a backbone": (
        functools.partial(
            transformers, "Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", out_features=["stage3"], **VIT
        ),
        {"encoder.layer.0": Point(32, 8, "NLC", 5), "encoder.layer.2": Point(32, 8, "NLC", 5)},
    ),
    "transformers: Swin, as a backbone": (
        functools.partial(
            transformers,
            "SwinBackbone",
            "SwinConfig",
            embed_dim=16,
            depths=[1, 1, 2],
            num_heads=[1, 2, 4],
            window_size=4,
            image_size=SIDE,
            out_features=["stage2", "stage3"],
        ),
        {"swin.encoder.layers.0": Point(32, 8, "NLC"), "swin.encoder.layers.1": Point(64, 16, "NLC")},
    ),
    "transformers: ConvNeXt V2": (
        functools.partial(
            transformers,
            "ConvNextV2ForImageClassification",
            "ConvNextV2Config",
            hidden_sizes=[8, 16, 32, 64],
            depths=[1, 1, 1, 1],
        ),
        {"convnextv2.encoder.stages.2": Point(32, 16, "NCHW"), "convnextv2.encoder": Point(64, 32, "NCHW")},
    ),
    "MONAI: U-Net": (
        functools.partial(monai, "UNet", in_channels=3, out_channels=2, channels=(8, 16, 32), strides=(2, 2)),
        {"model.0": Point(8, 2, "NCHW"), "model.1.submodule.0": Point(16, 4, "NCHW")},
    ),
    "MONAI: DenseNet": (
        functools.partial(monai, "DenseNet121", in_channels=3, out_channels=5, init_features=16, growth_rate=8),
        {"features.denseblock2": Point(128, 8, "NCHW"), "features.norm5": Point(256, 32, "NCHW")},
    ),
}


def cell(column):
    hosts = [pytest.param(*host, marks=pytest.mark.cell(TABLE, name, column), id=name) for name, host in HOSTS.items()]
    return pytest.mark.parametrize(("make", "points"), hosts)


X = draw(2, 3, SIDE, SIDE, dtype=torch.float32)


@cell("points")
def test_points_are_where_the_source_has_them(make, points):
    all_points = insertion_points(make_host(make), example_input=X)
    assert {name: all_points.get(name) for name in points} == points


@cell("starts equal")
@torch.no_grad()
def test_identity_start_leaves_outputs_equal_and_remove_gives_the_original_model_back(make, points):
    original = make_host(make)
    model = insert(make_host(make), dict.fromkeys(points, CSFE), example_input=X, identity_start=True)
    assert outputs_are_equal(model(X), original(X))
    result = model.load_state_dict(original.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys
    assert all(key.startswith(tuple(f"{name}.kfde." for name in points)) for key in result.missing_keys)
    for name in points:
        scatter_parameters(model.get_submodule(f"{name}.kfde"))
    changed = model(X)
    assert not outputs_are_equal(changed, original(X))
    copies = [copy.deepcopy(model)]
    if not type(original).__module__.startswith("transformers"):  # after a first forward, its hooks cannot be pickled
        copies.append(pickle.loads(pickle.dumps(model)))
    for copied in copies:
        assert outputs_are_equal(copied(X), changed)
        assert list(remove(copied).state_dict()) == list(original.state_dict())
        assert outputs_are_equal(copied(X), original(X))


@cell("trains")
def test_every_inserted_parameter_trains(make, points):
    blocks = dict(zip(points, (CSFE, MFDF), strict=True))
    model = insert(make_host(make), blocks, example_input=X, identity_start=True)
    added = {name: parameter for name, parameter in model.named_parameters() if ".kfde." in name}
    optimizer = torch.optim.Adam(added.values(), lr=0.1)
    for _ in range(2):  # a blend of zero stops the block's gradients in the first step
        optimizer.zero_grad()
        sum((out * draw(*out.shape, seed=1, dtype=out.dtype)).sum() for out in tensors_of(model(X))).backward()
        optimizer.step()
    for name, parameter in added.items():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@cell("half precision")
@torch.no_grad()
def test_blocks_join_a_model_in_bfloat16(make, points):
    model = insert(make_host(make).bfloat16(), dict.fromkeys(points, CSFE), example_input=X.bfloat16())
    blocks = [model.get_submodule(f"{name}.kfde") for name in points]
    assert {parameter.dtype for block in blocks for parameter in block.parameters()} == {torch.bfloat16}
    reference = insert(make_host(make), dict.fromkeys(points, CSFE), example_input=X)
    assert not outputs_are_equal(model(X.bfloat16()), make_host(make).bfloat16()(X.bfloat16()))
    for expected, actual in zip(tensors_of(reference(X)), tensors_of(model(X.bfloat16())), strict=True):
        assert actual.dtype == torch.bfloat16
        assert (expected - actual).norm() < 0.2 * expected.norm()
