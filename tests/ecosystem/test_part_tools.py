"""Libraries that adapt, quantise, explain or offload modules find the parts of the layers; compared part by part."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

from kfde_layers import CSFE, MFDF, insert
from kfde_layers.testing import random_tensor, scatter_parameters
from tests.support.inputs import images
from tests.support.parts import MADE, call_parts, draw_map, make_layer

each_layer = pytest.mark.parametrize("name", MADE)
each_mfdf = pytest.mark.parametrize("name", [name for name in MADE if name.startswith("MFDF")])


@pytest.mark.cell("Tools that change parts", "LoRA of peft")
@each_mfdf
def test_lora_around_fc1_and_fc2(name):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=3, target_modules=["fc1", "fc2"], init_lora_weights=False)
    layer, x = make_layer(name), draw_map()
    expected = layer(x)
    adapted = peft.get_peft_model(copy.deepcopy(layer), config).double()
    y = adapted(x)
    assert (y - expected).abs().max() > 1e-3
    torch.testing.assert_close(y, call_parts(adapted.base_model.model, x), rtol=1e-9, atol=1e-9)
    y.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(gradients) == 4
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapted.merge_and_unload()(x), y, rtol=1e-9, atol=1e-9)


def test_lora_leaves_the_branches_fused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layer = scatter_parameters(MFDF(8, impl="fused")).double()
    adapted = peft.get_peft_model(layer, peft.LoraConfig(r=3, target_modules=["fc1"], init_lora_weights=False)).double()
    torch.testing.assert_close(adapted(draw_map()), call_parts(adapted.base_model.model, draw_map()))


def test_lora_on_all_linear_layers_of_a_model():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = timm.create_model("kfde_convnextv2_atto", num_classes=2)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted(images(64)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if "lora" in name}
    of_mfdf = [gradient for name, gradient in gradients.items() if ".fc1." in name or ".fc2." in name]
    assert len(of_mfdf) >= 4
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.cell("Tools that change parts", "quantize_dynamic")
@each_mfdf
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*deprecat.*:UserWarning")
def test_quantize_dynamic(name):
    layer, x = make_layer(name, torch.float32), draw_map(dtype=torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.fc1) is type(quantised.fc2) is torch.ao.nn.quantized.dynamic.Linear
    y = quantised(x)
    torch.testing.assert_close(y, call_parts(quantised, x), rtol=1e-4, atol=1e-4)
    assert 0 < (y - layer(x)).abs().max() < 0.1 * layer(x).abs().max()
    torch.testing.assert_close(torch.jit.script(quantised)(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.cell("Tools that change parts", "int8 weights of torchao")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_mfdf
def test_int8_weights_of_torchao(name, dtype):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    layer, x = make_layer(name, dtype), draw_map(dtype=dtype)
    quantised = copy.deepcopy(layer)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    assert type(quantised.fc1.weight) is not nn.Parameter
    y, tolerance = quantised(x), 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(y, call_parts(quantised, x), rtol=tolerance, atol=tolerance)
    assert 0 < (y - layer(x)).abs().max() < 0.05 * layer(x).abs().max()


@pytest.mark.cell("Tools that change parts", "cpu_offload and disk_offload of Accelerate")
@pytest.mark.parametrize("offload", ["cpu", "disk"])
@each_layer
def test_weights_that_are_loaded_when_a_part_is_called(name, offload, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    layer, x = make_layer(name), draw_map()
    network = nn.Sequential(layer, nn.Conv2d(8, 2, 1).double()).eval()
    expected = network(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Accelerate, on a machine without an accelerator
        if offload == "cpu":
            accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(network, tmp_path, execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in layer.parameters())
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


def test_a_model_dispatched_to_disk(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    model = scatter_parameters(timm.create_model("kfde_convnextv2_atto", num_classes=2), deviation=0.1).eval()
    x = images(64)
    expected = model(x)
    devices = {name: "cpu" for name, _ in model.named_children()} | {"stages.3": "disk"}
    devices |= {f"stages.{index}": "cpu" for index in range(3)}
    del devices["stages"]
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path)
    assert any(parameter.is_meta for parameter in model.stages[3].kfde.parameters())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["mfdf.branches.3", "mfdf.branches.0", "csfe.cfe", "csfe.sfe"])
def test_grad_cam_at_a_part(target):
    cam = pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is not installed")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets", reason="pytorch-grad-cam is not installed")
    model = timm.create_model("kfde_convnextv2_atto", num_classes=2).double().eval()
    scatter_parameters(model.stages[3].kfde)
    part, x = model.stages[3].kfde.get_submodule(target), images(64).double()
    with cam.GradCAM(model, [part]) as grad_cam:
        overlay = grad_cam(x, [targets.ClassifierOutputTarget(1)] * len(x))
    assert overlay.shape == (2, 64, 64)

    outputs = []
    handle = part.register_forward_hook(lambda module, args, output: outputs.append(output))
    scores = model(x)[:, 1]
    handle.remove()
    (gradient,) = torch.autograd.grad(scores.sum(), outputs)
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * outputs[0]).sum(dim=1).clamp(min=0)
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    expected = ((expected - low) / (high - low + 1e-7)).detach()
    enlarged = torch.nn.functional.interpolate(expected[:, None], size=64, mode="bilinear")[:, 0]
    assert torch.corrcoef(torch.stack([torch.tensor(overlay).flatten(), enlarged.float().flatten()]))[0, 1] > 0.98


def test_a_host_that_draws_weights_of_its_own_undoes_the_start_and_reset_parameters_restores_it():
    torch.manual_seed(0)

    def likeness(layer):
        x = random_tensor(2, layer.channels, 28, 28)
        return float(torch.corrcoef(torch.stack([x.flatten(), layer(x).flatten()]))[0, 1].detach())

    host = timm.create_model("resnet18", block_args=dict(attn_layer=MFDF))
    layers = [module for module in host.modules() if isinstance(module, MFDF)]
    assert len(layers) == 8
    assert all(likeness(layer) < 0.3 for layer in layers)
    for layer in layers:
        layer.reset_parameters()
    assert all(likeness(layer) > 0.99 for layer in layers)


def test_hooks_on_the_parts_of_an_inserted_block():
    resnet = timm.create_model("resnet18", num_classes=2)
    model = insert(resnet, {"layer3": CSFE, "layer4": MFDF}, identity_start=True).eval()
    leaves = {name: part for name, part in model.named_modules() if ".kfde." in name and not list(part.children())}
    seen = set()
    for name, part in leaves.items():
        part.register_forward_hook(lambda *args, name=name: seen.add(name))
    model(images(64))
    assert seen == set(leaves)
