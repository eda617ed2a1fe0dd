"""Training under autocast, in bfloat16, and in float16 with a scaled loss."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.training import (
    MODELS,
    SMALL,
    STEPS,
    WITH_BATCH_NORM,
    batch,
    build,
    exact_training,
    layers_of,
    make_optimizer,
)

pytestmark = pytest.mark.slow

each_network = pytest.mark.parametrize("name", [*SMALL, *WITH_BATCH_NORM, *MODELS])
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    optimizer.zero_grad()
    with torch.autocast(images.device.type, dtype):
        loss = F.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def assert_near_the_exact_curve(name: str, device: str, dtype: torch.dtype, scaler: torch.amp.GradScaler) -> None:
    model = build(name, torch.float32).to(device)
    dtypes = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda layer, inputs, output: dtypes.append((inputs[0].dtype, output.dtype)))
    images, labels = (tensor.to(device) for tensor in batch(name, torch.float32))
    optimizer = make_optimizer(name, model)
    losses = torch.stack([step(model, optimizer, scaler, images, labels, dtype) for _ in range(STEPS)])
    curve, _ = exact_training(name)
    # Every layer rounds its activations by half a unit at most, and a loss is a mean over many of them.
    tolerance = torch.finfo(dtype).eps / 2 * float(curve[0])
    torch.testing.assert_close(losses.double().cpu(), curve, rtol=0, atol=tolerance)
    assert curve[0] - curve[-1] > 4 * tolerance
    assert dtypes
    for input_dtype, output_dtype in dtypes:
        assert output_dtype == input_dtype
        assert input_dtype in (dtype, torch.float32)  # some layers before ours always return float32
    assert name in MODELS or {input_dtype for input_dtype, _ in dtypes} == {dtype}
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


@each_device
@each_network
@pytest.mark.cell("Training engines", "autocast, bfloat16")
def test_bfloat16_follows_the_exact_loss_curve(name, device):
    assert_near_the_exact_curve(name, device, torch.bfloat16, torch.amp.GradScaler(device, enabled=False))


@each_device
@each_network
@pytest.mark.cell("Training engines", "autocast, float16 with GradScaler")
def test_float16_with_a_scaled_loss_follows_the_exact_loss_curve(name, device):
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    assert_near_the_exact_curve(name, device, torch.float16, scaler)
    assert scaler.get_scale() == 2.0**8  # no step was skipped


@each_device
@each_network
@pytest.mark.cell("Training engines", "autocast, float16 with GradScaler")
def test_an_overflow_reaches_the_scaler_which_skips_the_step(name, device):
    model = build(name, torch.float32).to(device)
    images, labels = (tensor.to(device) for tensor in batch(name, torch.float32))
    optimizer, scaler = make_optimizer(name, model), torch.amp.GradScaler(device, init_scale=2.0**40)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(model, optimizer, scaler, images, labels, torch.float16)
    assert not next(model.parameters()).grad.isfinite().all()  # the overflow came through the layers
    assert all(map(torch.equal, model.parameters(), before))
    assert scaler.get_scale() == 2.0**39
    scaler.update(2.0**8)
    step(model, optimizer, scaler, images, labels, torch.float16)
    assert not any(map(torch.equal, model.parameters(), before))
    assert scaler.get_scale() == 2.0**8
