import inspect

import pytest
import timm
import torch
from torch import nn

import kfde_layers
from kfde_layers import CFE, CSFE, MFDF, SFE, functional, insert
from kfde_layers.layers import Blend
from kfde_layers.testing import random_tensor, scatter_parameters

SIGNATURES = {
    kfde_layers.CFE: "channels num_groups=None threshold=0.5 eps=1e-05 * impl='auto' device=None dtype=None",
    kfde_layers.SFE: "channels=None lambd=0.0001 beta=0.5 correction=0 * impl='auto' device=None dtype=None",
    kfde_layers.CSFE: "channels num_groups=None threshold=0.5 lambd=0.0001 beta=0.5 correction=0 eps=1e-05 "
    "arrangement='parallel' fusion='sum' * impl='auto' device=None dtype=None",
    kfde_layers.MFDF: "channels kernel_sizes=(1, 3, 5, 7) dilation=1 groups='depthwise' bias=True norm_layer=None "
    "act_layer=None rd_ratio=0.0625 rd_channels=None * impl='auto' device=None dtype=None",
    functional.cfe: "x weight bias num_groups threshold=0.5 eps=1e-05 * impl='auto'",
    functional.sfe: "x lambd=0.0001 beta=0.5 correction=0 * impl='auto'",
    functional.csfe: "x weight bias num_groups threshold=0.5 lambd=0.0001 beta=0.5 correction=0 eps=1e-05 "
    "arrangement='parallel' fusion='sum' * impl='auto'",
    functional.mfdf: "x branch_weights branch_biases fc1_weight fc1_bias fc2_weight fc2_bias dilation=1 "
    "groups='depthwise' * impl='auto'",
    kfde_layers.insert: "model blocks * example_input=None identity_start=False",
    kfde_layers.insertion_points: "model * example_input=None",
    kfde_layers.remove: "model names=None",
}


def signature_of(function) -> str:
    words = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        words.append(parameter.name + default)
    return " ".join(words)


def test_names():
    assert kfde_layers.__all__ == ["CFE", "CSFE", "MFDF", "SFE", "functional", "insert", "insertion_points", "remove"]
    assert functional.__all__ == ["cfe", "csfe", "mfdf", "sfe"]
    assert kfde_layers.__version__.count(".") == 2


def test_signatures():
    for function, signature in SIGNATURES.items():
        assert signature_of(function) == signature, function


def test_every_public_name_is_documented():
    for function in SIGNATURES:
        text = inspect.getdoc(function)
        for section in ("Args:", "Raises:", "Examples:"):
            assert section in text, (function, section)
        for name in inspect.signature(function).parameters:
            assert f"    {name}:" in text, (function, name)


KEYS = {
    "CFE": "bias weight",
    "SFE": "",
    "CSFE": "cfe.bias cfe.weight",
    "MFDF": "branches.0.bias branches.0.weight branches.1.bias branches.1.weight "
    "fc1.bias fc1.weight fc2.bias fc2.weight",
    "MFDF with a norm": "branches.0.conv.weight branches.0.norm.bias branches.0.norm.num_batches_tracked "
    "branches.0.norm.running_mean branches.0.norm.running_var branches.0.norm.weight "
    "fc1.bias fc1.weight fc2.bias fc2.weight",
    "Blend": "blend block.bias block.weight",
}


def test_keys_of_state_dicts():
    layers = {
        "CFE": CFE(8),
        "SFE": SFE(8),
        "CSFE": CSFE(8),
        "MFDF": MFDF(8, (1, 3)),
        "MFDF with a norm": MFDF(8, (3,), bias=False, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU),
        "Blend": Blend(CFE(8), 8),
    }
    for name, keys in KEYS.items():
        assert " ".join(sorted(layers[name].state_dict())) == keys, name
    resnet = insert(timm.create_model("resnet18"), {"layer4": CFE}, identity_start=True)
    assert sorted(key for key in resnet.state_dict() if "kfde" in key) == [
        f"layer4.kfde.{key}" for key in KEYS["Blend"].split()
    ]
    model = timm.create_model("kfde_convnextv2_atto", mfdf=dict(kernel_sizes=(1, 3)))
    keys = [f"csfe.{key}" for key in KEYS["CSFE"].split()] + [f"mfdf.{key}" for key in KEYS["MFDF"].split()]
    assert sorted(key for key in model.state_dict() if "kfde" in key) == [f"stages.3.kfde.{key}" for key in keys]


SCHEMAS = {  # scripted files hold these
    "cfe": "kfde::cfe(Tensor x, Tensor weight, Tensor bias, int num_groups, float threshold, float eps, str impl) "
    "-> Tensor",
    "sfe": "kfde::sfe(Tensor x, float lambd, float beta, int correction, str impl) -> Tensor",
    "csfe": "kfde::csfe(Tensor x, Tensor weight, Tensor bias, int num_groups, float threshold, float lambd, "
    "float beta, int correction, float eps, str arrangement, str fusion, str impl) -> Tensor",
    "mfdf": "kfde::mfdf(Tensor x, Tensor[] branch_weights, Tensor[] branch_biases, Tensor fc1_weight, "
    "Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, int[] dilation, int groups, str impl) -> Tensor",
    "mfdf_fuse": "kfde::mfdf_fuse(Tensor x, Tensor[] maps, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, "
    "Tensor fc2_bias) -> Tensor",
}


def test_schemas_of_the_operators_in_scripted_files():
    for name, schema in SCHEMAS.items():
        assert str(getattr(torch.ops.kfde, name).default._schema) == schema


def test_the_operator_that_older_scripted_files_hold_still_runs():
    layer = scatter_parameters(MFDF(8, groups=1, kernel_sizes=(1, 3)))
    x = random_tensor(2, 8, 5, 7)
    maps = [branch(x) for branch in layer.branches]
    fc = (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)
    torch.testing.assert_close(torch.ops.kfde.mfdf_fuse(x, maps, *fc), layer(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: functional.cfe(x, w, w[:1], 1), "cfe: bias must have shape"),
        (lambda x, w: functional.cfe(x, w, w, 1, threshold=2), "cfe: threshold must lie strictly between 0 and 1"),
        (lambda x, w: functional.sfe(x[0]), "sfe: x must have shape"),
        (lambda x, w: functional.sfe(x, lambd=0), "sfe: lambd must be positive and finite, got 0"),
        (lambda x, w: functional.csfe(x, w, w, 3), "csfe: num_groups must divide channels = 2, got 3"),
        (lambda x, w: functional.csfe(x, w, w, 1, fusion="max"), "csfe: fusion must be one of"),
        (lambda x, w: functional.mfdf(x, [], None, w, w, w, w), "mfdf: fc1_weight must have shape"),
        (lambda x, w: functional.mfdf(x, [], None, torch.ones(1, 2), w, w, w), "mfdf: branch_weights must have"),
    ],
)
def test_an_error_names_the_function(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(torch.zeros(1, 2, 3, 3), torch.ones(2))
