"""Properties that every layer has, in each of its options."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfde_layers import CFE, CSFE, MFDF, SFE
from tests.support.agreement import has_memory_format, relative_error, use_reference
from tests.support.cases import LAYERS, make_layer
from tests.support.gates import input_away_from_threshold
from tests.support.inputs import batches, draw, memory_formats, seeds, sides

each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


@given(st.sampled_from(list(LAYERS.values())), batches, sides, sides, seeds, memory_formats, st.booleans())
def test_shape_dtype_and_memory_format_are_kept(make, batch, height, width, seed, memory_format, requires_grad):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = make_layer(make).to(dtype)
        x = draw(batch, 6, height, width, seed=seed, dtype=dtype, memory_format=memory_format)
        y = layer(x.requires_grad_(requires_grad))
        assert y.shape == x.shape
        assert y.dtype == dtype
        assert y.device == x.device
        assert has_memory_format(y, memory_format)
        assert y.requires_grad == (requires_grad or any(p.requires_grad for p in layer.parameters()))
        # The same rounded input in float64. In low precision only the result is rounded. In float32 and float64 the
        # steps before it round too, and so do norms and activations: these modules compute in the dtype of x.
        in_double = layer.double()(x.double())
        one_rounding = dtype in (torch.bfloat16, torch.float16) and getattr(layer, "plain_branches", True)
        assert relative_error(y, in_double) < (1 if one_rounding else 32) * torch.finfo(dtype).eps


@each_layer
@pytest.mark.parametrize("training", [False, True])
def test_map_and_parameters_may_have_different_dtypes(training, make):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for of_map, of_parameters in itertools.permutations(dtypes, 2):
        layer = make_layer(make).to(of_parameters).train(training)
        exact = use_reference(copy.deepcopy(layer).double())
        x = input_away_from_threshold(exact, 2, 6, 3, 5, margin=1e-3, dtype=of_map)
        y = layer(x.requires_grad_())
        assert y.dtype == of_map
        coarsest = max(torch.finfo(of_map).eps, torch.finfo(of_parameters).eps)
        assert relative_error(y, exact(x.double())) < 32 * coarsest
        gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        assert all(gradient.isfinite().all() for gradient in gradients)


@each_layer
def test_autocast_keeps_the_dtype_of_the_input(make):
    layer = make_layer(make)
    for dtype in (torch.float32, torch.bfloat16):
        x = draw(2, 6, 17, 15, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == dtype
        plain = getattr(layer, "plain_branches", True)  # norms and activations follow autocast
        assert relative_error(y, layer.double()(x.double())) < (2**-7 if dtype == torch.bfloat16 or not plain else 1e-5)
        layer.float()


@each_layer
def test_one_pixel_and_empty_batches(make):
    layer = make_layer(make)
    assert layer(draw(1, 6, 1, 1, dtype=torch.float32)).isfinite().all()
    assert layer(draw(0, 6, 4, 3, dtype=torch.float32)).shape == (0, 6, 4, 3)


@each_layer
def test_a_sample_alone_equals_the_sample_in_a_batch(make):
    layer = make_layer(make).double()
    x = draw(5, 6, 15, 17)
    alone = torch.cat([layer(sample) for sample in x.split(1)])
    torch.testing.assert_close(layer(x), alone, rtol=1e-10, atol=1e-10)


@each_layer
def test_every_parameter_gets_a_gradient(make):
    layer = make_layer(make).train()
    layer(draw(2, 6, 7, 5, dtype=torch.float32).requires_grad_()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@each_layer
def test_gradcheck(make):
    layer = make_layer(make).double()
    reference = use_reference(copy.deepcopy(layer))
    x = input_away_from_threshold(reference, 2, 6, 3, 4, margin=1e-3, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True) if list(layer.parameters()) else ((), ())

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *parameters), fast_mode=True)


@each_layer
def test_state_dict_deepcopy_and_pickle(make):
    layer, x = make_layer(make), draw(2, 6, 7, 5, dtype=torch.float32)
    expected = layer(x)
    fresh = make(6).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    if "Blend" not in type(layer).__name__:
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)


@each_layer
def test_device_and_dtype_reach_every_parameter(make):
    for device, dtype in (("meta", torch.float32), ("cpu", torch.float64)):
        layer = make(6, device=device, dtype=dtype)
        for tensor in layer.state_dict().values():
            assert tensor.device.type == device
            assert tensor.dtype == dtype or not tensor.is_floating_point()
    on_meta = make(6, device="meta")
    assert on_meta.eval()(torch.empty(2, 6, 5, 7, device="meta")).shape == (2, 6, 5, 7)


@pytest.mark.filterwarnings(
    "ignore:The TorchScript type system doesn't support instance-level:UserWarning"
)  # GraphModule
@each_layer
def test_the_tracer_of_torch_fx_gives_the_same_numbers(make):
    layer, x = make_layer(make), draw(3, 6, 16, 15, dtype=torch.float32)
    traced = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(traced(x), layer(x))
    torch.testing.assert_close(torch.jit.script(traced)(x), layer(x))


@each_layer
def test_gradients_with_a_graph_are_the_same_and_can_be_differentiated(make):
    """Inside a layer one tensor is computed from another: no part of the gradient may be counted twice."""
    layer = make_layer(make).double()
    inputs = [draw(2, 6, 5, 4).requires_grad_(), *layer.parameters()]
    cotangent = draw(2, 6, 5, 4, seed=1)
    plain = torch.autograd.grad(layer(inputs[0]), inputs, cotangent)
    graphed = torch.autograd.grad(layer(inputs[0]), inputs, cotangent, create_graph=True)
    for plain_gradient, graphed_gradient in zip(plain, graphed, strict=True):
        torch.testing.assert_close(graphed_gradient, plain_gradient, rtol=1e-10, atol=1e-10)
    reference = use_reference(copy.deepcopy(layer))
    expected = torch.autograd.grad(
        reference(inputs[0]), [inputs[0], *reference.parameters()], cotangent, create_graph=True
    )
    second_gradients = [
        torch.autograd.grad(gradients[0].square().sum(), inputs[0])[0] for gradients in (graphed, expected)
    ]
    torch.testing.assert_close(*second_gradients, rtol=1e-9, atol=1e-9)


@given(st.sampled_from(list(LAYERS.values())), sides, memory_formats)
def test_an_activation_may_change_the_output_in_place(make, size, memory_format):
    layer = make_layer(make)
    for side in (size, 19):
        x = draw(2, 6, side, side, dtype=torch.float32, memory_format=memory_format).requires_grad_()
        layer(x).relu_().sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("layer_class", [CFE, CSFE, MFDF])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(8, 5, 5), ValueError, r"x must have shape \(N, C, H, W\), got 3 dimensions: \(8, 5, 5\)"),
        (torch.zeros(2, 6, 5, 5), ValueError, "x must have 8 channels in dimension 1, got 6"),
        (torch.zeros(2, 8, 5, 5).int(), TypeError, r"x must be a floating-point tensor \(.*\), got torch.int32"),
    ],
)
def test_unfit_inputs_are_refused(layer_class, x, error, message):
    with pytest.raises(error, match=message):
        layer_class(8)(x)


@pytest.mark.parametrize("layer_class", [CFE, CSFE, MFDF])
def test_unfit_channels_are_refused(layer_class):
    for channels, error in ((0, ValueError), (-2, ValueError), (6.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"channels must be .* got {channels}"):
            layer_class(channels)


@pytest.mark.parametrize("layer_class", [CFE, SFE, CSFE, MFDF])
def test_an_unknown_implementation_is_refused_at_construction(layer_class):
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference', 'fused', got 'cuda'"):
        layer_class(8, impl="cuda")


@each_layer
@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.float16)])
def test_defaults_for_new_tensors_do_not_matter(make, device, dtype):
    layer, x = make_layer(make), draw(2, 6, 9, 8, dtype=torch.float32).requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            actual = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, actual, expected))
