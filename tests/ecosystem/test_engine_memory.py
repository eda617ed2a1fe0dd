"""Training in channels_last, and with activations that are computed again instead of saved."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.training import (
    MODELS,
    SMALL,
    STEPS,
    WITH_BATCH_NORM,
    batch,
    build,
    build_reference,
    layers_of,
    train,
)

pytestmark = pytest.mark.slow

each_network = pytest.mark.parametrize("name", [*SMALL, *WITH_BATCH_NORM, *MODELS])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_network
@pytest.mark.cell("Training engines", "channels_last")
def test_channels_last_trains_like_contiguous_and_stays_so(name, dtype):
    model = build(name, dtype).to(memory_format=torch.channels_last)
    images, labels = batch(name, dtype)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    outputs = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))

    reference = build_reference(name)
    exact_images = batch(name)[0].requires_grad_()
    tolerance = 64 * torch.finfo(dtype).eps
    losses, exact = train(name, model, images, labels), train(name, reference, exact_images, labels)
    torch.testing.assert_close(losses.double(), exact, rtol=tolerance, atol=tolerance)
    pairs = [(images, exact_images), *zip(model.parameters(), reference.parameters(), strict=True)]
    largest = max(float(expected.grad.abs().max()) for _, expected in pairs)
    for actual, expected in pairs:  # images sum their gradients over all steps, parameters hold the last one
        torch.testing.assert_close(actual.grad.double(), expected.grad, rtol=0, atol=tolerance * largest)
    assert len(outputs) >= STEPS
    for tensor in (*outputs, images.grad, *(p for p in model.parameters() if p.ndim == 4)):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert not any(output.is_contiguous() for output in outputs)


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


@pytest.mark.parametrize("low", [False, True], ids=["float64", "autocast"])
@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.cell("Training engines", "activation checkpointing")
def test_a_checkpointed_layer_has_the_same_gradients_to_the_last_bit(name, low):
    plain, checkpointed = (build(name, torch.float32 if low else torch.float64) for _ in range(2))
    calls = []
    checkpointed[1].register_forward_pre_hook(lambda layer, inputs: calls.append(layer))
    checkpointed[1] = Checkpointed(checkpointed[1])
    images, labels = batch(name, torch.float32 if low else torch.float64)
    results = []
    for model in (plain, checkpointed):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert len(calls) == 2  # forward, and again in the backward pass
    assert all(map(torch.equal, *results))
    if not low:
        reference = build_reference(name)
        train(name, reference, images, labels, steps=1)
        for gradient, parameter in zip(results[1][1:], reference.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.cell("Training engines", "activation checkpointing")
def test_a_checkpointed_model_has_the_same_gradients_to_the_last_bit(name):
    plain, checkpointed = build(name), build(name)
    checkpointed.set_grad_checkpointing()
    calls = []
    checkpointed.stages[3].kfde.csfe.register_forward_pre_hook(lambda layer, inputs: calls.append(layer))
    losses = [train(name, model, *batch(name), steps=1) for model in (plain, checkpointed)]
    assert len(calls) == 2
    assert torch.equal(*losses)
    for (key, parameter), checkpointed_parameter in zip(
        plain.named_parameters(), checkpointed.parameters(), strict=True
    ):
        assert torch.equal(parameter.grad, checkpointed_parameter.grad), key
