from functools import partial

import numpy as np
import pytest
import timm
import torch
from breakhis.results.explain import CamTarget, by_class, cam_target, decisions, grad_cam, intervals_by_class
from torch import nn
from torch.nn import functional as F

from kfde_layers import CFE, CSFE, MFDF, insert
from tests.support.inputs import draw


def make_model(name: str, **arguments) -> nn.Module:
    """Make a timm classifier of three classes."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **arguments).eval()


def with_a_block_inserted() -> nn.Module:
    return insert(make_model("resnet10t"), {"layer4": CSFE})


class InPlace(nn.Module):
    """A classifier whose last map is overwritten by the next activation."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.fc = nn.Conv2d(3, 8, 7, stride=16), nn.ReLU(inplace=True), nn.Linear(8, 3)
        self.feature_info = [{"module": "body"}]

    def forward(self, x):
        return self.fc(self.act(self.body(x)).mean((2, 3)))


# Models, the module of their last feature map, and its layout.
MODELS = {
    "resnet": (partial(make_model, "resnet10t"), "layer4", "NCHW"),
    "densenet": (partial(make_model, "densenet121", block_config=(2, 2, 2, 2)), "features.norm5", "NCHW"),
    "vgg": (partial(make_model, "vgg11", mlp_ratio=0.01), "features.20", "NCHW"),
    "efficientnet": (partial(make_model, "efficientnet_b0"), "blocks.6", "NCHW"),
    "swin": (
        partial(make_model, "swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
        "layers.3",
        "NHWC",
    ),
    "vit": (partial(make_model, "vit_tiny_patch16_224", depth=2), "blocks.1.norm1", "NLC"),
    "convnext": (partial(make_model, "convnextv2_atto"), "stages.3", "NCHW"),
    "kfde": (partial(make_model, "kfde_convnextv2_atto"), "stages.3", "NCHW"),
    "inserted": (with_a_block_inserted, "layer4", "NCHW"),
    "in place": (InPlace, "body", "NCHW"),
}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name == "vgg" else name for name in MODELS])
def case(request):
    create, name, layout = MODELS[request.param]
    torch.manual_seed(1)
    return create().eval(), name, layout


def grad_cam_by_definition(model, name, layout, inputs, targets):
    """Compute Grad-CAM by its definition."""
    maps = []

    def keep(module, args, output):
        maps.append(output)
        return output.clone()  # the next module may work in place

    handle = model.get_submodule(name).register_forward_hook(keep)
    logits = model(inputs)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[torch.arange(len(targets)), targets].sum(), maps)
    values = maps[0].detach()
    if layout == "NLC":  # a class token and 14 x 14 patches
        values, gradient, layout = values[:, 1:].unflatten(1, (14, 14)), gradient[:, 1:].unflatten(1, (14, 14)), "NHWC"
    dims = [layout.index(letter) for letter in "NCHW"]
    values, gradient = values.permute(dims), gradient.permute(dims)
    return (gradient.mean((2, 3), keepdim=True) * values).sum(1).relu().numpy()


def test_the_target_is_the_last_feature_map(case):
    model, name, layout = case
    assert cam_target(model) == CamTarget(name, layout)


def test_grad_cam_follows_its_definition(case):
    model, name, layout = case
    inputs, targets = draw(4, 3, 224, 224, dtype=torch.float32), [0, 2, 1, 2]
    cams = grad_cam(model, inputs, targets)
    expected = grad_cam_by_definition(model, name, layout, inputs, targets)
    assert cams.shape == expected.shape  # one value for each cell of the map
    assert cams.shape[1] < 20
    assert cams.dtype == np.float32
    assert cams.min() >= 0
    assert cams.max() > 0  # not all of them are empty
    np.testing.assert_allclose(cams, expected, atol=1e-4 * expected.max())


def test_a_model_without_a_feature_map_is_refused():
    with pytest.raises(ValueError, match=r"returns a feature map, .* got a CrossVit with blocks\.0"):
        cam_target(make_model("crossvit_9_240"))
    with pytest.raises(ValueError, match="got a Sequential with none"):
        cam_target(nn.Sequential(nn.Conv2d(3, 4, 1)))


def test_explaining_does_not_change_the_model():
    model = make_model("kfde_convnextv2_atto").train()
    model.stem.eval().requires_grad_(False)
    inputs = draw(2, 3, 64, 64, dtype=torch.float32)
    model(inputs).sum().backward()
    weight = model.head.fc.weight
    before = {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "frozen": [parameter.requires_grad for parameter in model.parameters()],
        "gradient": weight.grad.clone(),
    }
    cams = grad_cam(model, inputs, [0, 1])
    decisions(model, [(inputs, torch.tensor([0, 1]), torch.tensor([0, 1]))])
    torch.testing.assert_close(dict(model.state_dict()), before["state"], rtol=0, atol=0)
    assert [module.training for module in model.modules()] == before["training"]
    assert [parameter.requires_grad for parameter in model.parameters()] == before["frozen"]
    torch.testing.assert_close(weight.grad, before["gradient"], rtol=0, atol=0)
    assert not any(
        hooks
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )
    assert inputs.grad is None
    assert not inputs.requires_grad
    with torch.no_grad():
        np.testing.assert_array_equal(grad_cam(model.requires_grad_(False), inputs, [0, 1]), cams)


def test_grad_cam_depends_on_the_class_and_not_on_other_images():
    model, inputs = make_model("resnet10t"), draw(2, 3, 96, 96, dtype=torch.float32)
    first, second = grad_cam(model, inputs, [0, 0])
    largest = max(first.max(), second.max())
    assert np.abs(grad_cam(model, inputs, [1, 1]) - [first, second]).max() > 0.1 * largest
    np.testing.assert_allclose(grad_cam(model, inputs[1:], [0])[0], second, atol=1e-3 * largest)


def test_an_unknown_class_is_an_error():
    with pytest.raises(IndexError):
        grad_cam(make_model("resnet10t"), draw(1, 3, 64, 64, dtype=torch.float32), [3])


def test_maps_of_different_images_are_on_one_scale():
    """Each image's map is that of its logit: a model whose logits are twice as large has twice as large maps."""
    model, inputs = make_model("resnet10t"), draw(2, 3, 96, 96, dtype=torch.float32)
    cams = grad_cam(model, inputs, [0, 0])
    assert cams[0].max() != pytest.approx(cams[1].max(), rel=1e-3)  # none is stretched to the same end
    with torch.no_grad():
        model.fc.weight *= 2
    np.testing.assert_allclose(grad_cam(model, inputs, [0, 0]), 2 * cams, rtol=1e-4, atol=1e-7)


def make_loader(inputs, targets, order):
    """Make batches of two images, in another order than that of the indices."""
    targets, order = torch.tensor(targets), torch.tensor(order)
    return [(inputs[part], targets[part], part) for part in order.split(2)]


def open_share(cfe, x):
    """Compute the share of open gates by eqs. (1)-(3), with PyTorch's group norm; r > 0.5 is a positive logit."""
    normalized = F.group_norm(x, cfe.num_groups, cfe.weight, cfe.bias, cfe.eps)
    logits = normalized * (cfe.weight / cfe.weight.sum())[:, None, None]
    return (logits > 0).double().mean((2, 3))


@pytest.mark.parametrize("arrangement", ["parallel", "cfe_sfe", "sfe_cfe"])
@pytest.mark.parametrize("identity_start", [False, True])
def test_decisions_are_those_of_the_layers_on_their_own_inputs(arrangement, identity_start):
    model = make_model("kfde_convnextv2_atto", csfe={"arrangement": arrangement}, identity_start=identity_start)
    inner = ".block" if identity_start else ""
    csfe, mfdf = (model.get_submodule(f"stages.3.kfde.{name}{inner}") for name in ("csfe", "mfdf"))
    with torch.no_grad():
        csfe.cfe.bias.normal_()
        mfdf.fc2.weight.normal_()
    inputs, targets, order = draw(5, 3, 96, 96, dtype=torch.float32), [1, 0, 2, 1, 0], [3, 0, 4, 1, 2]

    recorded = decisions(model, make_loader(inputs, targets, order))
    assert recorded.targets.tolist() == targets
    assert set(recorded.gates) == {f"stages.3.kfde.csfe{inner}.cfe"}
    assert set(recorded.branches) == {f"stages.3.kfde.mfdf{inner}"}

    maps = {}
    model.stages[3].blocks.register_forward_hook(lambda module, args, output: maps.update(csfe=output))
    model.stages[3].kfde.csfe.register_forward_hook(lambda module, args, output: maps.update(mfdf=output))
    with torch.no_grad():
        model(inputs)
        x = csfe.sfe(maps["csfe"]) if arrangement == "sfe_cfe" else maps["csfe"]
        shares, alpha = open_share(csfe.cfe, x), mfdf.branch_weights(maps["mfdf"])
    (gates,), (branches,) = recorded.gates.values(), recorded.branches.values()
    assert gates.shape == (5, 320)
    assert branches.shape == (5, 4, 320)
    np.testing.assert_allclose(gates, shares, atol=0.12)  # one of 9 positions may sit on the threshold
    assert np.mean(np.abs(gates - shares.numpy()) < 1e-6) > 0.999
    np.testing.assert_allclose(branches, alpha, atol=1e-5)
    np.testing.assert_allclose(branches.sum(axis=1), 1, atol=1e-5)
    assert branches.std(axis=0).max() > 1e-4  # the weights do depend on the image


def test_decisions_of_blocks_inserted_elsewhere():
    model = insert(make_model("resnet10t"), {"layer2": CFE, "layer3": MFDF, "layer4": CSFE})
    inputs = draw(2, 3, 64, 64, dtype=torch.float32)
    recorded = decisions(model, make_loader(inputs, [0, 1], [1, 0]))
    assert {name: rows.shape for name, rows in recorded.gates.items()} == {
        "layer2.kfde": (2, 128),
        "layer4.kfde.cfe": (2, 512),
    }
    assert {name: rows.shape for name, rows in recorded.branches.items()} == {"layer3.kfde": (2, 4, 256)}
    plain = decisions(make_model("resnet10t"), make_loader(inputs, [0, 1], [0, 1]))
    assert plain.gates == plain.branches == {}


def test_by_class_gives_mean_and_deviation_and_marks_absent_classes():
    values = np.array([[1.0, 10.0], [3.0, 10.0], [5.0, 20.0]])
    means, deviations = by_class(values, np.array([2, 2, 0]), 3)
    np.testing.assert_array_equal(means, [[5, 20], [np.nan, np.nan], [2, 10]])
    np.testing.assert_array_equal(deviations, [[0, 0], [np.nan, np.nan], [1, 0]])


def test_intervals_draw_groups_and_not_images():
    """Two groups of which one has three images: the mean over images of a draw is that of one group or of all."""
    values = np.array([[0.0], [4.0], [4.0], [4.0], [9.0], [1.0], [1.0]])
    targets, groups = np.array([0, 0, 0, 0, 1, 2, 2]), list("abbbacd")
    low, high = intervals_by_class(values, targets, groups, 4)
    np.testing.assert_array_equal(np.concatenate([low, high], axis=1)[[0, 2]], [[0, 4], [1, 1]])
    assert np.isnan(low[[1, 3]]).all()  # of one group, and of none
    assert np.isnan(high[[1, 3]]).all()


def test_an_interval_of_many_groups_is_that_of_the_standard_error():
    rng = np.random.default_rng(0)
    values = rng.normal([2, -1], 1, size=(400, 2))
    low, high = intervals_by_class(values, np.zeros(400, int), [str(index) for index in range(400)], 1)
    error = values.std(axis=0) / 400**0.5
    np.testing.assert_allclose(low[0], values.mean(axis=0) - 1.96 * error, atol=0.2 * error.max())
    np.testing.assert_allclose(high[0], values.mean(axis=0) + 1.96 * error, atol=0.2 * error.max())


def test_intervals_repeat_themselves():
    values, groups = np.random.default_rng(0).normal(size=(9, 3)), list("abcabcabc")
    first, second = (intervals_by_class(values, np.zeros(9, int), groups, 1) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("model", "point"), [("test_vit", "blocks.2"), ("test_resnet", "layer4")])
def test_an_inserted_block_does_not_change_where_the_map_is(model, point):
    plain = timm.create_model(model).eval()
    inserted = insert(timm.create_model(model), {point: "CSFE"}).eval()
    assert cam_target(inserted) == cam_target(plain)
    x = torch.randn(1, *plain.pretrained_cfg["input_size"])
    assert grad_cam(inserted, x, [0]).shape == grad_cam(plain, x, [0]).shape
