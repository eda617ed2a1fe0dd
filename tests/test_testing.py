import pytest
import torch
from torch import nn

from kfde_layers.testing import assert_error_budget, largest_error, random_affine, random_tensor, scatter_parameters

EXACT = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def test_the_budget_follows_the_reference():
    reference = (EXACT + 1e-3).float()
    assert_error_budget((EXACT + 3.9e-3).float(), reference, EXACT, factor=4)
    with pytest.raises(AssertionError, match=r"dx: error 4\.10e-03 is over the budget of 4\.00e-03"):
        assert_error_budget((EXACT + 4.1e-3).float(), reference, EXACT, factor=4, name="dx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_floor_counts_units_of_the_largest_value(dtype):
    step = 2 * torch.finfo(dtype).eps  # at the largest value, -2
    reference = EXACT.to(dtype)
    off = torch.tensor([0.0, step, 0.0], dtype=torch.float64)
    assert_error_budget((EXACT - 3 * off).to(dtype), reference, EXACT, floor=3.1)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_error_budget((EXACT - 3 * off).to(dtype), reference, EXACT, floor=2.9)


@pytest.mark.parametrize("where", ["actual", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_fail(where, value):
    tensors = {"actual": EXACT.float(), "reference": EXACT.float()}
    tensors[where] = tensors[where].clone()
    tensors[where][1] = value
    with pytest.raises(AssertionError, match="over the budget"):
        assert_error_budget(**tensors, exact=EXACT)


def test_tensors_that_cannot_be_compared_fail():
    with pytest.raises(AssertionError, match=r"exact must be float64, got torch\.float32"):
        assert_error_budget(EXACT.float(), EXACT.float(), EXACT.float())
    with pytest.raises(AssertionError, match=r"must have the same dtype, got torch\.float16 and torch\.float32"):
        assert_error_budget(EXACT.half(), EXACT.float(), EXACT)
    with pytest.raises(
        AssertionError, match=r"actual, reference and exact must have the same shape, got \(3, 1\), \(3,\), \(3,\)"
    ):
        assert_error_budget(EXACT.float()[:, None], EXACT.float(), EXACT)


def test_empty_tensors_have_no_error():
    assert_error_budget(EXACT[:0].float(), EXACT[:0].float(), EXACT[:0])


def test_largest_error():
    assert largest_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0], dtype=torch.float64)) == 0.5


def test_a_map_is_the_same_in_every_dtype_and_memory_format():
    exact = random_tensor(2, 6, 3, 5, seed=7, mean=10.0, dtype=torch.float64)
    assert 9 < float(exact.mean()) < 11
    assert 0.8 < float(exact.std()) < 1.2
    for dtype in (torch.float32, torch.bfloat16):
        x = random_tensor(2, 6, 3, 5, seed=7, mean=10.0, dtype=dtype, memory_format=torch.channels_last)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, exact.to(dtype))
    assert not torch.equal(exact, random_tensor(2, 6, 3, 5, seed=8, mean=10.0, dtype=torch.float64))


def test_affine_parameters_are_neither_one_nor_zero():
    weight, bias = random_affine(50, seed=3, dtype=torch.bfloat16)
    assert weight.dtype == bias.dtype == torch.bfloat16
    assert weight.shape == bias.shape == (50,)
    assert 0.5 < float(weight.float().mean()) < 1.5
    assert float((weight.float() - 1).abs().max()) > 0.3
    assert float(bias.float().abs().max()) > 0.3


def test_every_parameter_is_moved_alike_for_the_same_seed():
    modules = [scatter_parameters(nn.BatchNorm2d(5), deviation=0.1, seed=seed) for seed in (0, 0, 1)]
    weights = [module.weight.detach() for module in modules]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert all(0 < abs(weight - 1).max() < 1 for weight in weights)
    assert all(module.bias.abs().min() > 0 for module in modules)
