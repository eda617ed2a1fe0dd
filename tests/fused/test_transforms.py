"""Batched gradients, and the transforms of `torch.func`, give the numbers of one call after the other."""

import pytest
import torch
from torch.autograd.functional import jacobian

from kfde_layers import CFE, CSFE, MFDF, SFE, functional
from kfde_layers.fused import batching
from kfde_layers.testing import scatter_parameters
from tests.support.agreement import relative_error
from tests.support.inputs import MEMORY_FORMATS, draw

LAYERS = {
    "CFE": lambda impl: CFE(6, impl=impl),
    "SFE": lambda impl: SFE(impl=impl),
    "CSFE": lambda impl: CSFE(6, fusion="mean", impl=impl),
    "CSFE, one group": lambda impl: CSFE(6, num_groups=1, impl=impl),
    "CSFE, cfe_sfe": lambda impl: CSFE(6, arrangement="cfe_sfe", impl=impl),
    "CSFE, sfe_cfe": lambda impl: CSFE(6, arrangement="sfe_cfe", impl=impl),
    "MFDF": lambda impl: MFDF(6, impl=impl),
    "MFDF, dilated, no bias": lambda impl: MFDF(6, (3, 5), dilation=(2, 1), bias=False, impl=impl),
}
SIZES = [(1, 6, 1, 1), (2, 6, 5, 4), (3, 6, 16, 16), (1, 6, 48, 50)]
TOLERANCE = 1e-11  # in float64


def make(name, impl="fused"):
    torch.manual_seed(0)
    return scatter_parameters(LAYERS[name](impl)).double()


each_layer = pytest.mark.parametrize("name", LAYERS)


@each_layer
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("impl", ["auto", "fused"])
def test_a_jacobian_in_one_pass(name, shape, impl):
    layer, x = make(name, impl), draw(*shape)

    def scores(x):
        return layer(x).sin().mean(dim=(2, 3))

    assert relative_error(jacobian(scores, x, vectorize=True), jacobian(scores, x)) < TOLERANCE


@each_layer
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
def test_gradients_of_parameters_in_one_pass(name, memory_format):
    layer, x = make(name), draw(2, 6, 9, 8, memory_format=memory_format).requires_grad_()
    y, cotangents = layer(x), draw(3, 2, 6, 9, 8, seed=1)
    tensors = [x, *layer.parameters()]
    together = torch.autograd.grad(y, tensors, cotangents, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, tensors, cotangent, retain_graph=True) for cotangent in cotangents]
    for batched, separate in zip(together, map(torch.stack, zip(*one_by_one, strict=True)), strict=True):
        assert relative_error(batched, separate) < TOLERANCE


@each_layer
def test_a_graph_of_batched_gradients_is_differentiated_again(name):
    layer, x = make(name), draw(2, 6, 5, 4).requires_grad_()
    cotangents = draw(3, 2, 6, 5, 4, seed=1)

    def penalty(batched):
        y = layer(x).sin()
        if batched:
            (gradients,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, create_graph=True)
        else:
            gradients = torch.stack([torch.autograd.grad(y, x, c, create_graph=True)[0] for c in cotangents])
        return torch.autograd.grad(gradients.square().sum(), x)[0]

    assert relative_error(penalty(batched=True), penalty(batched=False)) < TOLERANCE


@each_layer
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_vmap_over_inputs(name, dim):
    layer, stack = make(name), draw(4, 2, 6, 5, 7)
    expected = torch.stack([layer(x) for x in stack])
    assert relative_error(torch.vmap(layer, in_dims=dim)(stack.movedim(0, dim)), expected) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "SFE"])
@pytest.mark.parametrize("same_input", [True, False])
def test_vmap_over_an_ensemble(name, same_input):
    """Parameters are batched, and the input too or not."""
    layers, x = [make(name) for _ in range(3)], draw(3, 2, 6, 5, 7)
    for seed, layer in enumerate(layers):
        torch.manual_seed(seed)
        scatter_parameters(layer)
    parameters, buffers = torch.func.stack_module_state(layers)

    def call(parameters, buffers, x):
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    inputs = x[0] if same_input else x
    y = torch.vmap(call, in_dims=(0, 0, None if same_input else 0))(parameters, buffers, inputs)
    assert relative_error(y, torch.stack([layer(x[0 if same_input else k]) for k, layer in enumerate(layers)])) < 1e-11


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_vmap_over_one_branch(index, part):
    layer, x = make("MFDF"), draw(2, 6, 5, 7)
    key = f"branches.{index}.{part}"
    values = torch.stack([dict(layer.named_parameters())[key] * factor for factor in (0.5, 1, 2)])

    def call(value):
        return torch.func.functional_call(layer, {key: value}, (x,))

    assert relative_error(torch.vmap(call)(values), torch.stack([call(value) for value in values])) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize("name", ["CSFE", "MFDF"])
def test_gradients_of_each_sample_in_lower_precision(name, memory_format, dtype):
    layer = make(name).to(dtype)
    x = draw(3, 6, 9, 8, dtype=dtype, memory_format=memory_format)

    def loss(sample):
        return layer(sample[None]).float().sin().sum()

    expected = torch.stack([torch.func.grad(loss)(sample) for sample in x])
    assert relative_error(torch.vmap(torch.func.grad(loss))(x), expected) < 4 * torch.finfo(dtype).eps


@each_layer
def test_nested_vmap(name):
    layer, stack = make(name), draw(2, 3, 1, 6, 5, 4)
    expected = torch.stack([torch.stack([layer(x) for x in row]) for row in stack])
    assert relative_error(torch.vmap(torch.vmap(layer))(stack), expected) < TOLERANCE


@each_layer
def test_second_derivatives_by_torch_func(name):
    x, v = draw(2, 6, 5, 4), draw(2, 6, 5, 4, seed=1)
    fused, reference = make(name), make(name, "reference")

    def product(layer, x):
        """Return the Hessian of a loss of the layer, times v."""
        of_first_order = torch.func.grad(lambda x: layer(x).sin().sum())
        return torch.func.grad(lambda x: (of_first_order(x) * v).sum())(x)

    assert relative_error(product(fused, x), product(reference, x)) < TOLERANCE


@each_layer
def test_the_fused_form_runs_and_auto_takes_the_reference(name, monkeypatch):
    calls = []
    for operator in ("csfe_fused", "merged_convolution"):
        overload = getattr(torch.ops.kfde, operator)
        monkeypatch.setattr(
            torch.ops.kfde, operator, lambda *args, overload=overload: calls.append(1) or overload(*args)
        )
    x = draw(2, 1, 6, 5, 4)
    torch.vmap(make(name))(x)
    assert calls
    calls.clear()
    torch.vmap(make(name, "auto"))(x)
    assert not calls


@each_layer
@pytest.mark.parametrize("shape", [(3, 0, 6, 5, 4), (0, 2, 6, 5, 4), (0, 0, 6, 5, 4), (2, 1, 6, 0, 4)], ids=str)
def test_empty_batches(name, shape):
    layer, x = make(name), torch.zeros(shape, dtype=torch.float64)
    assert torch.vmap(layer)(x).shape == x.shape
    assert torch.vmap(torch.func.grad(lambda x: layer(x).sum()))(x).shape == x.shape


def test_an_empty_ensemble():
    x, weights = draw(2, 6, 5, 4), torch.ones(0, 6, dtype=torch.float64)
    y = torch.vmap(lambda weight: functional.cfe(x, weight, torch.zeros_like(weight), 2, impl="fused"))(weights)
    assert y.shape == (0, 2, 6, 5, 4)


@pytest.mark.parametrize("impl", ["auto", "fused"])
def test_jvp_is_refused_by_fused_alone(impl):
    layer, x = make("CSFE", impl), draw(1, 6, 5, 4)
    if impl == "fused":
        with pytest.raises(NotImplementedError, match="it has no rule for forward-mode differentiation"):
            torch.func.jvp(layer, (x,), (x,))
    else:
        assert torch.func.jvp(layer, (x,), (x,))[1].abs().max() > 0
    # a transform around one that can be taken
    assert torch.func.grad(lambda x: torch.vmap(layer)(x[None]).sin().sum())(x).abs().max() > 0


@pytest.mark.parametrize("name", ["CSFE", "MFDF"])
def test_the_comparison_can_fail(name, monkeypatch):
    join = batching._join
    monkeypatch.setattr(batching, "_join", lambda argument, dim, size: join(argument.flip(0), dim, size))
    layer, stack = make(name), draw(4, 4, 6, 5, 7)
    assert relative_error(torch.vmap(layer)(stack), torch.stack([layer(x) for x in stack])) > TOLERANCE
