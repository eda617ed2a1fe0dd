"""What the caller may give for a block, and what PyTorch's defaults do to it."""

import functools

import pytest
import timm
import torch
from timm.layers import EcaModule, SEModule
from timm.layers.cbam import CbamModule
from torch import nn

from kfde_layers import CFE, CSFE, MFDF, SFE, insert, insertion_points
from kfde_layers.layers import Blend
from tests.support.inputs import images
from tests.support.networks import plain_backbone


@pytest.mark.parametrize(
    ("block", "layer", "options"),
    [
        ("CFE", CFE, {}),
        ("SFE", SFE, {}),
        ("CSFE", CSFE, {}),
        ("MFDF", MFDF, {}),
        (["MFDF", {"kernel_sizes": [3, 5], "dilation": 2}], MFDF, {"kernel_sizes": (3, 5), "dilation": [2, 2]}),
        (
            ("CSFE", {"arrangement": "cfe_sfe", "impl": "reference"}),
            CSFE,
            {"arrangement": "cfe_sfe", "impl": "reference"},
        ),
        (("SFE", {}), SFE, {}),
        ("csfe", CSFE, {}),
        ("SimAM", SFE, {"correction": 1}),
        ({"mfdf": {"kernel_sizes": [3]}}, MFDF, {"kernel_sizes": (3,)}),
        ({"CSFE": None}, CSFE, {}),
        ("se", SEModule, {}),
        (["eca", {"kernel_size": 5}], EcaModule, {}),
        ("CBAM", CbamModule, {}),
    ],
)
def test_a_name_stands_for_a_layer(block, layer, options):
    model = insert(plain_backbone(), {"1": block}, example_input=images(32))
    assert type(model[1].kfde) is layer
    assert {name: getattr(model[1].kfde, name) for name in options} == options


@pytest.mark.parametrize(
    ("blocks", "keys", "types"),
    [
        (["CSFE", "MFDF"], ["csfe", "mfdf"], [CSFE, MFDF]),
        (["csfe"], ["csfe"], [CSFE]),
        (["csfe", {"mfdf": {"kernel_sizes": [3, 5]}}], ["csfe", "mfdf"], [CSFE, MFDF]),
        ([["sfe", {"beta": 1.0}], "cbam"], ["sfe", "cbam"], [SFE, CbamModule]),
        ((CFE, nn.ReLU(), "cfe", "cfe"), ["cfe", "relu", "cfe_2", "cfe_3"], [CFE, nn.ReLU, CFE, CFE]),
        ([["csfe", "mfdf"], "se"], ["sequential", "se"], [nn.Sequential, SEModule]),
    ],
)
def test_a_list_of_blocks_runs_in_its_order(blocks, keys, types):
    model = plain_backbone()
    expected = model[:2](images(32))
    sequence = insert(model, {"1": blocks}, example_input=images(32)).eval()[1].kfde
    assert list(dict(sequence.named_children())) == keys
    assert [type(part) for part in sequence] == types
    for part in sequence:
        expected = part(expected)
    assert torch.equal(model[:2](images(32)), expected)


def test_layers_of_an_option_are_named():
    options = {"groups": 1, "norm_layer": "batchnorm2d", "act_layer": "relu"}
    model = insert(plain_backbone(), {"1": {"mfdf": options}}, example_input=images(32))
    assert isinstance(model[1].kfde.branches[0].norm, nn.BatchNorm2d)
    assert isinstance(model[1].kfde.branches[0].act, nn.ReLU)


def test_names_and_pairs_come_from_yaml():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    blocks = yaml.safe_load("{'1': CSFE, '2': [MFDF, {kernel_sizes: [3, 5]}]}")
    model = insert(plain_backbone(), blocks, example_input=images(32), identity_start=True)
    assert isinstance(model[1].kfde, Blend)
    assert model[2].kfde.block.kernel_sizes == (3, 5)


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        ("CFES", ValueError, "at '1' .* the name must be one of CFE, .* layer of timm, such as 'se', got 'cfes'"),
        ("", ValueError, "the name must be one of CFE, .*, got ''"),
        (("Conv2d", {}), ValueError, "got 'conv2d'"),
        (("CSFE", "sum"), ValueError, "got 'sum'"),
        (["CSFE", {"MFDF": {"kernels": 3}}], TypeError, "unexpected keyword argument 'kernels'"),
        (["CSFE", {}, 1], TypeError, r"or a list of these, got \['CSFE', {}, 1\]"),
        ((CSFE, {}), TypeError, "or a list of these"),
        ([], TypeError, r"or a list of these, got \[\]"),
        ({"CSFE": {}, "MFDF": {}}, TypeError, "or a list of these"),
        ({"CSFE": 3}, TypeError, "or a list of these"),
        ({"Conv2d": {}}, TypeError, "or a list of these"),
        (["CSFE", 3], TypeError, "the block at '1' must be .* or a list of these, got 3"),
        (None, TypeError, "or a list of these, got None"),
        (b"CSFE", TypeError, "or a list of these"),
        (
            {"mfdf": {"act_layer": "rely"}},
            ValueError,
            r"mfdf\['act_layer'\] must be a layer or timm's name of one, got 'rely'",
        ),
        ({"se": {"rd": 3}}, TypeError, "unexpected keyword argument 'rd'"),
        (
            ["MFDF", {"kernels": 3}],
            TypeError,
            "cannot be made for its 32 .*unexpected keyword argument 'kernels'",
        ),
        (["MFDF", {"kernel_sizes": [4]}], ValueError, "cannot be made for its 32 channels: kernel_sizes must be odd"),
        (CSFE(32, device="meta"), ValueError, "the block at '1' must have values, got parameters on the device meta"),
        (
            lambda channels: CFE(channels, device="meta"),
            ValueError,
            "must have values, got parameters on the device meta",
        ),
    ],
)
def test_other_blocks_are_refused(block, error, message):
    model = plain_backbone()
    with pytest.raises(error, match=message):
        insert(model, {"1": block}, example_input=images(32))
    assert list(model.state_dict()) == list(plain_backbone().state_dict())


BLOCKS = {"a name": "CSFE", "a class": MFDF, "a function": functools.partial(MFDF, kernel_sizes=(3,))}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16)]
)
@pytest.mark.parametrize("identity_start", [True, False])
def test_a_block_is_on_the_device_and_in_the_dtype_of_its_module(block, device, dtype, identity_start):
    model = plain_backbone().to(torch.float32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            assert insertion_points(model)["1"].channels == 32
            insert(model, {"1": block}, identity_start=identity_start)
    finally:
        torch.set_default_dtype(before)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.float32)}
    x = images(32)
    assert model(x).isfinite().all()
    # the start is the documented one: near the identity, or the identity itself
    y, kept = model[1].kfde(x.new_ones(1, 32, 8, 8)), x.new_ones(1, 32, 8, 8)
    if identity_start:
        assert torch.equal(y, kept)
    elif block != "CSFE":
        assert (y - kept)[..., 2:-2, 2:-2].abs().max() < 0.5


def test_a_model_on_meta_gets_blocks_on_meta():
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    insert(model, {"layer2": CSFE, "layer3": "MFDF"})
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_in_half_precision_gets_blocks_in_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).to(torch.bfloat16)
    insert(model, {"0": "MFDF", "1": CSFE(8)})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
