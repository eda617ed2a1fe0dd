"""`torch.func`: under its transforms a module gives the numbers of its reference, or says why it cannot."""

import pytest
import torch

from tests.support.agreement import relative_error
from tests.support.cases import CASES, TABLE, each_case, module_and_reference
from tests.support.inputs import MEMORY_FORMATS, draw

# Both sides compute in float64, which rounds by 2e-16.
TOLERANCE = 1e-11


# a ConvNeXt of timm gives this warning by itself, where it moves the channels last
slow_in_timm = pytest.mark.filterwarnings(
    "ignore:There is a performance drop .* batching rule for aten..as_strided_:UserWarning"
)


def in_double(case):
    """Return the module and its reference in float64, and an input."""
    module, reference = module_and_reference(case)
    return module.double(), reference, draw(*case.shapes[0])


def loss(module, parameters, x):
    """Return a number for one sample, whose gradient differs between positions."""
    return torch.func.functional_call(module, parameters, (x[None],)).sin().sum()


def loop_over_samples(module, x):
    """Return the gradients of the loss of each sample, stacked: for the input, and for each parameter by its name."""
    parameters = dict(module.named_parameters())
    gradients = []
    for sample in x.clone().requires_grad_():
        inputs = [sample, *parameters.values()]
        gradients.append(torch.autograd.grad(loss(module, parameters, sample), inputs))
    of_input, *of_parameters = map(torch.stack, zip(*gradients, strict=True))
    return of_input, dict(zip(parameters, of_parameters, strict=True))


@torch.no_grad()
@pytest.mark.cell(TABLE, "torch.func: functional_call")
@each_case(CASES)
def test_functional_call_takes_other_parameters(case):
    module, reference, x = in_double(case)
    before = reference(x)
    parameters = {name: parameter + 0.1 * draw(*parameter.shape) for name, parameter in reference.named_parameters()}
    y = torch.func.functional_call(module, parameters, (x,))
    assert torch.equal(module(x), in_double(case)[0](x))  # the module's own parameters are unchanged
    reference.load_state_dict(parameters, strict=False)
    assert relative_error(y, reference(x)) < TOLERANCE
    assert not parameters or relative_error(y, before) > 0.01


@slow_in_timm
@torch.no_grad()
@pytest.mark.cell(TABLE, "torch.func: vmap")
@each_case(CASES)
def test_vmap(case):
    module, reference, x = in_double(case)
    stack = torch.stack((x, x.flip(1), 2 * x))
    y = torch.vmap(module, chunk_size=2)(stack)
    assert relative_error(y, torch.stack([reference(batch) for batch in stack])) < TOLERANCE


@slow_in_timm
@pytest.mark.cell(TABLE, "torch.func: vmap")
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@each_case(CASES)
def test_gradients_of_each_sample_by_vmap_of_grad(case, memory_format):
    module, reference, x = in_double(case)
    x = x.contiguous(memory_format=memory_format)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    each_sample = torch.vmap(torch.func.grad(loss, argnums=(1, 2)), in_dims=(None, None, 0))
    of_parameters, of_input = each_sample(module, parameters, x)
    expected_input, expected = loop_over_samples(reference, x)
    assert relative_error(of_input, expected_input) < TOLERANCE
    assert of_parameters.keys() == expected.keys()
    for name, gradient in of_parameters.items():
        assert relative_error(gradient, expected[name]) < TOLERANCE, name


@pytest.mark.cell(TABLE, "torch.func: grad")
@each_case(CASES)
def test_grad(case):
    module, reference, x = in_double(case)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    of_parameters, of_input = torch.func.grad(loss, argnums=(1, 2))(module, parameters, x[0])
    expected_input, expected = loop_over_samples(reference, x[:1])
    assert relative_error(of_input, expected_input[0]) < TOLERANCE
    for name, gradient in of_parameters.items():
        assert relative_error(gradient, expected[name][0]) < TOLERANCE, name
