import copy

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn

from kfde_layers import CSFE, MFDF
from kfde_layers.layers import Blend
from kfde_layers.models.kfde_convnextv2 import KFDEStage
from tests.support.agreement import count_parameters
from tests.support.checkpoints import SIDE, SIZES, backbone_and_kfde, load_pretrained, save_weights
from tests.support.inputs import images


def test_every_size_and_every_pretrained_tag_is_registered():
    assert timm.list_models("kfde_*") == [f"kfde_convnextv2_{size}" for size in SIZES]
    tags = timm.list_pretrained("convnextv2_*")
    assert timm.list_pretrained("kfde_*") == [f"kfde_{tag}" for tag in tags]
    for tag in tags:
        backbone, kfde = timm.get_pretrained_cfg(tag).to_dict(), timm.get_pretrained_cfg(f"kfde_{tag}").to_dict()
        assert kfde.pop("architecture") == "kfde_" + backbone.pop("architecture")
        assert kfde == backbone  # also the address of the weights and their licence


@pytest.mark.parametrize("size", SIZES)
def test_the_backbone_is_timms(size):
    backbone = timm.create_model(f"convnextv2_{size}", device="meta")
    kfde = timm.create_model(f"kfde_convnextv2_{size}", device="meta")
    kfde_shapes = {key: tensor.shape for key, tensor in kfde.state_dict().items()}
    backbone_shapes = {key: tensor.shape for key, tensor in backbone.state_dict().items()}
    assert {key: shape for key, shape in kfde_shapes.items() if ".kfde." not in key} == backbone_shapes
    assert all(key.startswith("stages.3.kfde.") for key in kfde_shapes.keys() - backbone_shapes.keys())
    for attribute in ("num_features", "head_hidden_size", "num_classes", "feature_info"):
        assert getattr(kfde, attribute) == getattr(backbone, attribute)


def test_kfde_adds_less_than_300_000_parameters_to_tiny():
    backbone, kfde = (timm.create_model(name, device="meta") for name in ("convnextv2_tiny", "kfde_convnextv2_tiny"))
    assert 0 < count_parameters(kfde) - count_parameters(backbone) < 300_000


def test_csfe_and_then_mfdf_follow_the_last_stage():
    model = timm.create_model("kfde_convnextv2_atto")
    assert [type(block) for block in model.stages[3].kfde] == [CSFE, MFDF]
    assert not any(isinstance(stage, KFDEStage) for stage in model.stages[:3])


@pytest.mark.parametrize(("csfe", "mfdf"), [(True, False), (False, True), (False, False)])
def test_ablations(csfe, mfdf):
    model = timm.create_model("kfde_convnextv2_atto", csfe=csfe, mfdf=mfdf)
    assert any(isinstance(module, CSFE) for module in model.modules()) == csfe
    assert any(isinstance(module, MFDF) for module in model.modules()) == mfdf
    if not csfe and not mfdf:
        assert model.state_dict().keys() == timm.create_model("convnextv2_atto").state_dict().keys()


def test_layer_options_stages_and_identity_start():
    model = timm.create_model(
        "kfde_convnextv2_atto",
        csfe={"arrangement": "cfe_sfe", "threshold": 0.4},
        mfdf={"kernel_sizes": (3, 5), "groups": 1, "norm_layer": nn.BatchNorm2d},
        kfde_stages=[2, 0],
        identity_start=True,
    )
    assert [isinstance(stage, KFDEStage) for stage in model.stages] == [True, False, True, False]
    for stage, channels in ((model.stages[0], 40), (model.stages[2], 160)):
        csfe, mfdf = stage.kfde
        assert type(csfe) is type(mfdf) is Blend
        assert (csfe.block.arrangement, csfe.block.cfe.threshold, csfe.block.cfe.channels) == ("cfe_sfe", 0.4, channels)
        assert (mfdf.block.kernel_sizes, mfdf.block.groups, mfdf.block.channels) == ((3, 5), 1, channels)
    assert model(images(SIDE)).shape == (2, 1000)


def test_timms_names_of_a_norm_and_an_activation_survive_a_saved_configuration(tmp_path):
    mfdf = {"kernel_sizes": [1, 3], "groups": 1, "norm_layer": "batchnorm2d", "act_layer": "relu"}
    model = timm.create_model("kfde_convnextv2_atto", mfdf=mfdf).eval()
    branch = model.stages[3].kfde.mfdf.branches[0]
    assert [type(part) for part in branch.children()] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    save_for_hf(model, str(tmp_path), model_args={"mfdf": mfdf}, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(images(SIDE)), model(images(SIDE)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"mfdf": {"act_layer": "x"}}, ValueError, r"mfdf\['act_layer'\] must be a layer or timm's name .* got 'x'"),
        ({"csfe": "parallel"}, TypeError, "csfe must be a bool or a dict of layer options, got 'parallel' of type str"),
        ({"mfdf": 4}, TypeError, "mfdf must be a bool or a dict of layer options, got 4 of type int"),
        ({"kfde_stages": 3}, TypeError, r"kfde_stages must be a sequence of stages, such as \(3,\), got 3 of type int"),
        ({"kfde_stages": (4,)}, ValueError, r"kfde_stages must lie in 0 ... 3, got 4"),
        ({"kfde_stages": (-1,)}, ValueError, r"kfde_stages must be at least 0, got -1"),
        ({"kfde_stages": (True,)}, TypeError, "kfde_stages must be an int, got True of type bool"),
        ({"identity_start": "no"}, TypeError, "identity_start must be a bool, got 'no' of type str"),
        ({"csfe": {"arrangement": "x"}}, ValueError, "arrangement must be one of"),
        ({"mfdf": {"reduction": 4}}, TypeError, "reduction"),
    ],
)
def test_refusals(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("kfde_convnextv2_atto", **kwargs)


def test_device_and_dtype():
    model = timm.create_model("kfde_convnextv2_atto", device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(images(SIDE).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_classes": 8},
        {"num_classes": 0},
        {"in_chans": 1},
        {"global_pool": "max"},
        {"global_pool": ""},
        {"output_stride": 16},
        {"output_stride": 8},
        {"drop_rate": 0.3},
        {"drop_path_rate": 0.3},
        {"conv_mlp": False, "head_norm_first": True},
    ],
)
def test_output_is_the_backbones_with_kfde_before_the_head(kwargs):
    backbone, kfde = backbone_and_kfde(**kwargs)
    x = images(SIDE, channels=kwargs.get("in_chans", 3))
    features = backbone.norm_pre(kfde.stages[3].kfde(backbone.stages(backbone.stem(x))))
    torch.testing.assert_close(kfde.forward_features(x), features)
    torch.testing.assert_close(kfde(x), backbone.forward_head(features))
    assert not torch.allclose(kfde(x), backbone(x), rtol=1e-3)
    drops = [[type(m) for m in model.modules() if "Drop" in type(m).__name__] for model in (backbone, kfde)]
    assert drops[0] == drops[1]


def test_identity_start_leaves_the_backbone_as_it_is():
    backbone, kfde = backbone_and_kfde(identity_start=True)
    assert torch.equal(kfde(images(SIDE)), backbone(images(SIDE)))
    kfde.train()
    optimizer = torch.optim.SGD(kfde.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        kfde(images(SIDE)).square().mean().backward()
        optimizer.step()
    for name, parameter in kfde.named_parameters():  # after the blend, from the second step on
        assert parameter.grad.abs().max() > 0, name


def test_every_parameter_gets_a_gradient():
    model = timm.create_model("kfde_convnextv2_atto", kfde_stages=(0, 1, 2, 3)).train()
    model(images(SIDE)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.slow
def test_features_come_with_kfde(tmp_path):
    backbone, kfde = backbone_and_kfde()
    x = images(SIDE)
    *early, last = backbone.forward_intermediates(x, intermediates_only=True)
    expected = [*early, kfde.stages[3].kfde(last)]
    intermediates = kfde.forward_intermediates(x, intermediates_only=True)
    for intermediate, expected_map in zip(intermediates, expected, strict=True):
        torch.testing.assert_close(intermediate, expected_map)
    final, (last_intermediate,) = kfde.forward_intermediates(x, indices=1, norm=True)
    torch.testing.assert_close(last_intermediate, expected[3])
    torch.testing.assert_close(final, expected[3])

    overlay = save_weights(kfde, tmp_path / "kfde.pth")
    for options in (
        {},
        {"out_indices": (1, 3)},
        {"out_indices": (-1,)},
        *({"feature_cls": c} for c in ("getter", "fx")),
    ):
        model = load_pretrained("kfde_convnextv2_atto", overlay, features_only=True, **options)
        indices = options.get("out_indices", range(4))
        assert model.feature_info.channels() == [(40, 80, 160, 320)[index] for index in indices]
        for feature_map, index in zip(model(x), indices, strict=True):
            torch.testing.assert_close(feature_map, expected[index])


def test_pruning_keeps_kfde_where_it_keeps_the_stage():
    model = timm.create_model("kfde_convnextv2_atto", kfde_stages=(1, 3)).eval()
    x = images(SIDE)
    expected = model.forward_intermediates(x, intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1]
    assert [isinstance(stage, KFDEStage) for stage in model.stages] == [False, True]
    torch.testing.assert_close(model.forward_features(x), expected[1])


def test_reset_classifier():
    _, model = backbone_and_kfde()
    features = model(images(SIDE)), model.forward_features(images(SIDE))
    model.reset_classifier(0)
    assert model(images(SIDE)).shape == (2, 320)
    model.reset_classifier(5, "max")
    assert model(images(SIDE)).shape == (2, 5)
    assert model.get_classifier().out_features == 5
    torch.testing.assert_close(model.forward_features(images(SIDE)), features[1])


def test_gradient_checkpointing_covers_kfde():
    _, plain = backbone_and_kfde()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    calls = []
    for name, model in (("plain", plain), ("checkpointed", checkpointed)):
        model.stages[3].kfde.mfdf.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        model.train()(images(SIDE)).square().mean().backward()
    assert calls == ["plain", "checkpointed", "checkpointed"]  # the second time in the backward pass
    for (name, parameter), checkpointed_parameter in zip(
        plain.named_parameters(), checkpointed.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, checkpointed_parameter.grad, msg=name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_the_memory_format_stays_between_the_stage_and_kfde(memory_format, grad_checkpointing):
    """A stage always returns channels_last maps, and KFDE must not change that."""
    model = timm.create_model("kfde_convnextv2_atto").to(memory_format=memory_format)
    model.set_grad_checkpointing(grad_checkpointing)
    outputs = []
    for module in (model.stages[3].blocks, *model.stages[3].kfde):
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    features = model.forward_features(images(SIDE).contiguous(memory_format=memory_format))
    assert len(outputs) == (2 if grad_checkpointing else 3)  # checkpointing calls the blocks one by one
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in (*outputs, features))


def test_layer_decay_gives_kfde_the_rate_of_the_head():
    backbone, kfde = backbone_and_kfde()
    scales = []
    for model in (backbone, kfde):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
        scales.append({names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]})
    assert {name: scale for name, scale in scales[1].items() if ".kfde." not in name} == scales[0]
    for name, (lr_scale, weight_decay) in scales[1].items():
        if ".kfde." in name:
            assert lr_scale == 1.0
            assert weight_decay == (0.0 if kfde.get_parameter(name).ndim == 1 else 0.05)


def test_the_tracer_of_torch_fx_gives_the_same_numbers():
    _, model = backbone_and_kfde(num_classes=8)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images(SIDE)), model(images(SIDE)), rtol=1e-4, atol=1e-5)
