"""Calls that users expect to work; test_refusals.py has those that are refused."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from kfde_layers import CFE, CSFE, MFDF, SFE
from kfde_layers.functional import cfe, csfe, mfdf, sfe

X = torch.linspace(-1, 2, 2 * 8 * 5 * 5).reshape(2, 8, 5, 5)
ONES, ZEROS = torch.ones(8), torch.zeros(8)

INTEGERS = [np.int64(8), np.int32(8), np.uint8(8), np.array(8), torch.tensor(8)]
NUMBERS = [np.float32(0.5), np.float64(0.5), np.float16(0.5)]


def same(a, b):
    torch.manual_seed(0)
    first = a().eval()
    torch.manual_seed(0)
    second = b().eval()
    assert repr(first) == repr(second)
    assert torch.equal(first(X), second(X))
    assert torch.equal(torch.jit.script(first)(X), second(X))


@pytest.mark.parametrize("value", INTEGERS, ids=lambda value: type(value).__name__)
def test_integers_of_other_libraries_are_integers(value):
    two, one = value // 4, value // 8
    for make in (CFE, CSFE, SFE, MFDF):
        same(lambda make=make: make(value), lambda make=make: make(8))
    same(lambda: CFE(8, num_groups=two), lambda: CFE(8, num_groups=2))
    same(lambda: SFE(correction=one), lambda: SFE(correction=1))
    same(lambda: MFDF(8, dilation=two), lambda: MFDF(8, dilation=2))
    same(lambda: MFDF(8, groups=two, rd_channels=two), lambda: MFDF(8, groups=2, rd_channels=2))
    assert torch.equal(csfe(X, ONES, ZEROS, two), csfe(X, ONES, ZEROS, 2))


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: type(value).__name__)
def test_numbers_of_other_libraries_are_numbers(value):
    for name in ("threshold", "lambd", "beta", "eps"):
        same(lambda name=name: CSFE(8, **{name: value}), lambda name=name: CSFE(8, **{name: 0.5}))
    assert torch.equal(cfe(X, ONES, ZEROS, 2, value, value), cfe(X, ONES, ZEROS, 2, 0.5, 0.5))
    assert torch.equal(sfe(X, value, value), sfe(X, 0.5, 0.5))
    same(lambda: SFE(lambd=1, beta=0), lambda: SFE(lambd=1.0, beta=0.0))


@pytest.mark.parametrize(
    "sizes",
    [np.array([3, 5]), [np.int64(3), 5], (3, 5), torch.tensor([3, 5]), range(3, 6, 2)],
    ids=lambda s: type(s).__name__,
)
def test_arrays_are_sequences(sizes):
    same(lambda: MFDF(8, kernel_sizes=sizes), lambda: MFDF(8, kernel_sizes=(3, 5)))
    same(lambda: MFDF(8, (1, 3), dilation=sizes), lambda: MFDF(8, (1, 3), dilation=(3, 5)))
    model = timm.create_model("kfde_convnextv2_atto", kfde_stages=np.array([1, 3]), device="meta")
    assert {key.split(".")[1] for key in model.state_dict() if ".kfde." in key} == {"1", "3"}


@pytest.mark.parametrize("container", [nn.ParameterList, tuple, list])
def test_any_sequence_holds_the_kernels(container):
    layer = MFDF(8)
    weights = container([branch.weight for branch in layer.branches])
    biases = container([branch.bias for branch in layer.branches])
    fc = (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)
    assert torch.equal(mfdf(X, weights, biases, *fc), layer(X))


NOT_DENSE = {
    "sparse": lambda: X.to_sparse(),
    "rows": lambda: X.to_sparse_csr() if X.ndim == 2 else X.flatten(1).to_sparse_csr(),
    "mkldnn": lambda: X.to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([X[0], X[1]]),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse|nested tensors).*:UserWarning")
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize("make", [CFE, SFE, CSFE, MFDF])
def test_tensors_that_are_not_dense_are_refused(make, kind):
    with pytest.raises(TypeError, match=r"x must be a dense tensor of layout torch\.strided, got"):
        make(8)(NOT_DENSE[kind]())


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 8, 0, 6), (2, 8, 6, 0), (0, 8, 0, 0)])
@pytest.mark.parametrize(
    "layer",
    [CFE(8), SFE(), CSFE(8), CSFE(8, arrangement="cfe_sfe"), MFDF(8), MFDF(8, groups=1), MFDF(8, impl="reference")],
    ids=repr,
)
def test_empty_maps_give_empty_maps(layer, shape):
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
