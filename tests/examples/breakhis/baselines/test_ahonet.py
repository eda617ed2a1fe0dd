import pytest
import timm
import torch
from breakhis.baselines.ahonet import AHoNet, CovariancePool, covariance
from timm.layers import EcaModule
from torch import Tensor, nn

from tests.support.baselines import make_small


def root_by_eigenvalues(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.mT


def root_with_merged_ends(matrix: Tensor, iterations: int) -> Tensor:
    """Leave out the products with the identity in the first iteration, and what nothing uses in the last one."""
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype)
    normalised = matrix / trace
    z = 0.5 * (3 * identity - normalised)
    y = normalised @ z
    for _ in range(iterations - 2):
        step = 0.5 * (3 * identity - z @ y)
        y, z = y @ step, step @ z
    return trace.sqrt() * (y @ (0.5 * (3 * identity - z @ y)))


def noise(channels: int, positions: int) -> Tensor:
    return covariance(torch.randn(2, channels, positions, 1, dtype=torch.float64, generator=torch.manual_seed(0)))


def test_a_covariance_by_hand():
    x = torch.tensor([[[[1.0, 3.0]], [[2.0, 8.0]]]])  # channels (1, 3) and (2, 8): deviations of 1 and 3
    assert covariance(x).tolist() == [[[1.0, 3.0], [3.0, 9.0]]]


@pytest.mark.parametrize(("iterations", "expected"), [(1, [1.6875, 0.6875]), (2, [1.73034668, 0.868774414])])
def test_the_first_iterations_by_hand(iterations, expected):
    """Start from y = 3/4 and 1/4, the shares of the trace, whose root is 2, and from z = 1.

    The first t = (3 - z y) / 2 is 9/8 and 11/8, which makes y 27/32 and 11/32, and z 9/8 and 11/8. The second t is
    1.025390625 and 1.263671875.
    """
    root = CovariancePool(iterations).root(torch.diag(torch.tensor([3.0, 1.0]))[None])
    torch.testing.assert_close(root[0], torch.diag(torch.tensor(expected)))


def test_many_iterations_give_the_square_root():
    matrix = noise(5, 40)
    root = CovariancePool(30).root(matrix)
    torch.testing.assert_close(root, root_by_eigenvalues(matrix))
    torch.testing.assert_close(root @ root, matrix)


@pytest.mark.parametrize(("iterations", "distance"), [(3, 0.56), (5, 0.24), (7, 0.04), (10, 1e-5)])
def test_the_distance_to_the_square_root(iterations, distance):
    matrix = noise(64, 196)
    exact = root_by_eigenvalues(matrix)
    difference = CovariancePool(iterations).root(matrix) - exact
    assert (difference.norm() / exact.norm()).item() == pytest.approx(distance, rel=0.25)


def test_merging_the_first_and_the_last_iteration_changes_no_bit():
    matrix = noise(16, 20)
    assert torch.equal(CovariancePool(5).root(matrix), root_with_merged_ends(matrix, 5))


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_constant_map_has_output_0_and_a_finite_gradient(value):
    x = torch.full((2, 4, 3, 3), value, requires_grad=True)
    output = CovariancePool()(x)
    assert not output.any()
    output.sum().backward()
    assert x.grad.isfinite().all()


def test_the_output_is_the_upper_triangle_row_by_row():
    x = torch.randn(2, 3, 4, 4)
    pool = CovariancePool()
    root, output = pool.root(covariance(x)), pool(x)
    torch.testing.assert_close(root, root.mT)
    for column, (row, place) in enumerate([(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]):
        assert torch.equal(output[:, column], root[:, row, place])


def test_it_computes_in_float32_under_autocast():
    x = torch.randn(2, 8, 6, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = CovariancePool()(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, CovariancePool()(x.float()).bfloat16())


def test_the_gradient_is_that_of_the_equations():
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(CovariancePool(3), x)


def kernels(model: nn.Module) -> list[int]:
    return [module.conv.kernel_size[0] for module in model.modules() if isinstance(module, EcaModule)]


def test_the_places_and_kernels_of_the_attention():
    with torch.device("meta"):
        model = timm.create_model("ahonet_resnet18")
        assert kernels(model) == [3, 3, 5, 5, 5, 5, 5, 5]  # two blocks of 64, 128, 256 and 512 channels each
        assert kernels(timm.create_model("ahonet_resnet18", eca_kernel=3)) == [3] * 8
        last = timm.create_model("ahonet_resnet18", eca="last")
        assert kernels(last) == kernels(last.eca) == [5]
        assert kernels(timm.create_model("ahonet_resnet18", eca="last", eca_kernel=3)) == [3]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert {layer.dilation for layer in convolutions} == {(1, 1)}


def test_the_attention_after_the_last_stage_acts():
    model, images = make_small("ahonet-last"), torch.randn(2, 3, 64, 64)
    plain = model.trunk.forward_features(images)
    gate = model.eca.conv(plain.mean((2, 3))[:, None])[:, 0].sigmoid()
    torch.testing.assert_close(model.forward_features(images), plain * gate[:, :, None, None])


@pytest.mark.parametrize(("last_stride", "side"), [(1, 14), (2, 7)])
def test_the_stride_of_the_last_stage(last_stride, side):
    with torch.device("meta"):
        model = timm.create_model("ahonet_resnet18", last_stride=last_stride)
        assert model.forward_features(torch.empty(1, 3, 224, 224)).shape == (1, 512, side, side)
    assert model.feature_info[-1]["reduction"] == 16 * last_stride
    assert (model.num_features, model.head_hidden_size) == (512, 32_896)


def test_the_head_is_linear_in_the_root_of_the_reduced_map():
    model, images = make_small("ahonet"), torch.randn(2, 3, 64, 64)
    assert model.reduce[0].bias is None
    vector = CovariancePool(5)(model.reduce(model.trunk.forward_features(images)))
    assert vector.shape == (2, 36)
    torch.testing.assert_close(model(images), vector @ model.fc.weight.T + model.fc.bias)
    other = make_small("ahonet", iterations=2)
    assert other.global_pool.iterations == 2
    assert AHoNet.pools == ("cov",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eca": "first"}, "eca must be one of 'block', 'last', got 'first'"),
        ({"eca_kernel": 4}, "eca_kernel must be odd, got 4"),
        ({"last_stride": 3}, "last_stride must be one of 1, 2, got 3"),
        ({"reduction_dim": 0}, "reduction_dim must be at least 1, got 0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"global_pool": "avg"}, "global_pool must be one of 'cov', '', got 'avg'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_small("ahonet", **arguments)
