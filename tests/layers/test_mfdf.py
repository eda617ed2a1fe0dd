import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfde_layers import MFDF
from kfde_layers.functional import mfdf
from kfde_layers.ops.mfdf import branch_mean, branch_scores, branch_softmax
from kfde_layers.testing import scatter_parameters
from tests.support import oracle
from tests.support.agreement import as_numpy, count_operations, count_parameters, relative_error
from tests.support.inputs import draw


def test_starts_near_the_identity():
    for channels, size in ((64, 7), (96, 56), (768, 7)):
        x = draw(2, channels, size, size, dtype=torch.float32)
        y = MFDF(channels)(x)
        assert F.cosine_similarity(x.flatten(), y.flatten(), dim=0) > 0.95
        # with the initial weights of PyTorch it is not near
        layer = MFDF(channels)
        for branch in layer.branches:
            nn.Conv2d.reset_parameters(branch)
        assert F.cosine_similarity(x.flatten(), layer(x).flatten(), dim=0) < 0.6


def test_the_start_of_each_parameter():
    layer = MFDF(64)
    for branch, size in zip(layer.branches, (1, 3, 5, 7), strict=True):
        noise = branch.weight.detach().clone()
        noise[:, :, size // 2, size // 2] -= 1
        assert abs(noise.std() - 0.02) < 0.005
        assert branch.bias.abs().max() == 0
    for fc in (layer.fc1, layer.fc2):
        assert abs(fc.weight.std() - 0.02) < 0.002
        assert fc.bias.abs().max() == 0
    for branch in MFDF(64, groups=1, kernel_sizes=(1, 3)).branches:
        assert abs(branch.weight.std() - 0.02) < 0.002


def test_parameter_shapes_and_cost():
    layer = MFDF(768)
    assert layer.fc1.weight.shape == (48, 768)
    assert layer.fc2.weight.shape == (4 * 768, 48)
    assert [tuple(branch.weight.shape) for branch in layer.branches] == [(768, 1, k, k) for k in (1, 3, 5, 7)]
    assert count_parameters(layer) == 255_024
    assert count_parameters(MFDF(768, groups=1, norm_layer=nn.BatchNorm2d, device="meta")) == pytest.approx(
        49.7e6, rel=0.005
    )
    assert MFDF(64).fc1.out_features == 32
    assert MFDF(64, rd_channels=5).fc1.out_features == 5
    assert MFDF(768, rd_ratio=1 / 8).fc1.out_features == 96


def test_calls_the_function_with_its_own_parameters():
    layer = scatter_parameters(MFDF(6, (3, 5), dilation=(2, 1), groups=3))
    x = draw(2, 6, 5, 7, dtype=torch.float32)
    weights, biases = [b.weight for b in layer.branches], [b.bias for b in layer.branches]
    fc = (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)
    assert torch.equal(layer(x), mfdf(x, weights, biases, *fc, (2, 1), 3))


def test_branch_weights_explain_the_output():
    for kwargs in (
        {},
        {"dilation": 2},
        {"groups": 1},
        {"groups": 1, "norm_layer": nn.BatchNorm2d, "act_layer": nn.ReLU},
    ):
        layer = scatter_parameters(MFDF(6, **kwargs)).double().eval()
        x = draw(2, 6, 9, 7)
        alpha = layer.branch_weights(x)
        assert alpha.shape == (2, 4, 6)
        torch.testing.assert_close(alpha.sum(dim=1), torch.ones(2, 6).double())
        assert alpha.std() > 0.01
        maps = torch.stack([branch(x) for branch in layer.branches], dim=1)
        torch.testing.assert_close(layer(x), (alpha[..., None, None] * maps).sum(dim=1), rtol=1e-10, atol=1e-10)


def test_branch_weights_are_those_of_forward_in_every_dtype():
    layer = scatter_parameters(MFDF(6))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = draw(2, 6, 9, 7, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            alpha = layer.branch_weights(x)
        assert alpha.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(alpha.double(), layer.double().branch_weights(x.double()), rtol=1e-5, atol=1e-5)
        layer.float()


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
@pytest.mark.parametrize("of_parameters", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("of_map", [torch.float64, torch.float32, torch.bfloat16])
def test_branch_weights_have_the_dtype_of_the_statistics(of_map, of_parameters, norm_layer):
    layer = MFDF(6, (1, 3), norm_layer=norm_layer).to(of_parameters)
    assert layer.branch_weights(draw(2, 6, 5, 7, dtype=of_map)).dtype == torch.promote_types(of_map, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_branches_are_pooled_in_float32(dtype):
    layer = scatter_parameters(MFDF(6, (1, 3), norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU)).to(dtype).eval()
    x = draw(2, 6, 31, 29, dtype=dtype)
    p = branch_mean([branch(x).double() for branch in layer.branches])
    scores = branch_scores(p, layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)
    expected = branch_softmax(scores, x.double(), 2)
    torch.testing.assert_close(layer.branch_weights(x).double(), expected, rtol=0, atol=1e-5)


def test_norm_and_activation_equal_the_paper_in_loops():
    layer = scatter_parameters(MFDF(6, (1, 3), groups=1, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU)).double()
    x = draw(3, 6, 5, 7)
    layer.train()(x)  # moves the running statistics away from their start
    layer.eval()

    def norm_and_relu(norm):
        tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return lambda branch: oracle.relu(oracle.batch_norm(branch, *map(as_numpy, tensors), norm.eps))

    expected = oracle.mfdf(
        as_numpy(x),
        [as_numpy(branch.conv.weight) for branch in layer.branches],
        [as_numpy(branch.conv.bias) for branch in layer.branches],
        *map(as_numpy, (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)),
        [1, 1],
        1,
        [norm_and_relu(branch.norm) for branch in layer.branches],
    )
    assert relative_error(layer(x), expected) < 1e-12


def trained_layer(**kwargs):
    """Make a layer with batch norms whose statistics have moved away from their start."""
    layer = scatter_parameters(MFDF(6, (1, 3), norm_layer=nn.BatchNorm2d, **kwargs)).double()
    layer.train()(draw(3, 6, 5, 7, seed=7))
    return layer.eval()


@pytest.mark.parametrize(
    "kwargs", [{}, {"groups": 1}, {"act_layer": nn.GELU}, {"bias": False}, {"groups": 2, "dilation": 2}]
)
def test_batch_norms_are_folded_outside_training(kwargs):
    layer, x = trained_layer(**kwargs), draw(2, 6, 5, 7, seed=8)
    activate = kwargs.get("act_layer", nn.Identity)()
    maps = [activate(branch.norm(branch.conv(x))) for branch in layer.branches]
    scores = branch_scores(branch_mean(maps), layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)
    alpha = branch_softmax(scores, x, len(maps))
    expected = (alpha[..., None, None] * torch.stack(maps, dim=1)).sum(dim=1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    for gradient, expected_gradient in zip(
        torch.autograd.grad(layer(x).square().sum(), layer.parameters()),
        torch.autograd.grad(expected.square().sum(), layer.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)
    assert count_operations(lambda: layer(x))["aten::batch_norm"] == 0
    assert count_operations(lambda: layer.train()(x))["aten::batch_norm"] == 2


def test_a_norm_kept_in_training_is_not_folded():
    layer, x = trained_layer(), draw(2, 6, 5, 7, seed=8)
    folded = layer(x)
    layer.branches[1].norm.train()
    assert (layer(x) - folded).abs().max() > 1e-3
    layer.eval()
    assert (layer(x) - folded).abs().max() > 0  # the statistics have moved


def test_batch_norms_are_folded_with_their_own_eps_and_not_in_16_bits():
    for kwargs in ({}, {"act_layer": nn.ReLU}):
        layer, x = trained_layer(**kwargs), draw(2, 6, 5, 7, seed=8)
        before = layer(x)
        for branch in layer.branches:
            branch.norm.eps = 1.0
        assert (layer(x) - before).abs().max() > 1e-3
        for mixed in (False, True):
            layer = layer.to(torch.bfloat16)
            for branch in layer.branches:
                branch.norm.to(torch.float32 if mixed else torch.bfloat16)
            low = x.to(torch.bfloat16)
            operations = count_operations(lambda layer=layer, low=low: layer(low))
            assert operations["aten::batch_norm"] == (
                0 if layer.mergeable_in_eval else 2
            )  # merged, it is computed in float32


def test_linear_branches_are_merged_outside_training():
    layer, x = trained_layer(), draw(2, 6, 5, 7, seed=8)
    assert layer.mergeable_in_eval
    assert not trained_layer(act_layer=nn.ReLU).mergeable_in_eval
    assert not trained_layer(groups=1).mergeable_in_eval
    assert count_operations(lambda: layer(x))["aten::conv2d"] == 2
    layer.impl = "fused"
    assert count_operations(lambda: layer(x))["aten::conv2d"] == 1


def test_branch_maps_are_summed_as_they_come():
    layer, x = MFDF(6, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU), draw(2, 6, 9, 8, dtype=torch.float32)
    for mode in (True, False):
        operations = count_operations(lambda mode=mode: layer.train(mode)(x))
        assert operations["aten::stack"] == 0
        assert operations["aten::addcmul"] == 3


def test_selective_kernel_has_the_same_equations():
    """Two dense branches with batch norm and ReLU, against the equations of SK with sum and softmax."""
    layer = MFDF(8, (3, 5), groups=1, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU).double().eval()
    x = draw(2, 8, 9, 7)
    u1, u2 = (branch(x) for branch in layer.branches)
    z = layer.fc1((u1 + u2).mean(dim=(2, 3)))
    a, b = layer.fc2(z).unflatten(1, (2, 8)).softmax(dim=1).unbind(dim=1)
    torch.testing.assert_close(layer(x), a[..., None, None] * u1 + b[..., None, None] * u2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"kernel_sizes": (3, 4)}, ValueError, "kernel_sizes must be odd, so that the map keeps its size, got 4"),
        ({"kernel_sizes": 3}, TypeError, "kernel_sizes must be a sequence of odd ints, got 3 of type int"),
        ({"dilation": 1.5}, TypeError, "dilation must be a sequence of ints, or an int, got 1.5 of type float"),
        ({"kernel_sizes": ()}, ValueError, "kernel_sizes must have at least one entry, got none"),
        ({"kernel_sizes": (3.0,)}, TypeError, "kernel_sizes must be an int, got 3.0"),
        ({"bias": "no"}, TypeError, "bias must be a bool, got 'no' of type str"),
        (
            {"norm_layer": "bn"},
            TypeError,
            "norm_layer must be a class or function that makes a module, or None, got 'bn'",
        ),
        ({"act_layer": nn.ReLU()}, TypeError, r"act_layer must be a class or function .* got ReLU\(\)"),
        ({"dilation": (1, 2)}, ValueError, r"dilation must be an int or have 4 entries, one per branch, got \(1, 2\)"),
        ({"dilation": (1, 1, 0, 1)}, ValueError, "dilation must be at least 1, got 0"),
        ({"groups": 3}, ValueError, "groups must divide channels = 8, got 3"),
        ({"groups": "grouped"}, ValueError, "groups must be an int or 'depthwise', got 'grouped'"),
        ({"rd_channels": 0}, ValueError, "rd_channels must be at least 1, got 0"),
        ({"rd_ratio": 0}, ValueError, "rd_ratio must be positive and finite, got 0"),
        ({"impl": "fused", "groups": 1}, NotImplementedError, "impl='fused' needs depthwise branches .* groups=1"),
        ({"impl": "fused", "act_layer": nn.ReLU}, NotImplementedError, "without norm and activation"),
        ({"impl": "fused", "norm_layer": nn.BatchNorm2d}, NotImplementedError, "without norm and activation"),
    ],
)
def test_refusals(kwargs, error, message):
    with pytest.raises(error, match=message):
        MFDF(8, **kwargs)


def test_unfit_inputs_are_refused_in_front_of_norms_too():
    layer = MFDF(8, act_layer=nn.ReLU)
    with pytest.raises(ValueError, match="x must have 8 channels in dimension 1, got 6"):
        layer(torch.zeros(2, 6, 5, 5))
    with pytest.raises(ValueError, match="x must have 8 channels in dimension 1, got 6"):
        layer.branch_weights(torch.zeros(2, 6, 5, 5))


def test_repr():
    expected = "MFDF(\n  8, kernel_sizes=(1, 3, 5, 7), dilation=(1, 1, 1, 1), groups=8, impl='auto'\n"
    assert repr(MFDF(8)).startswith(expected)
