"""What the caller may give for a block, and what PyTorch's defaults do to it."""

import functools

import pytest
import timm
import torch
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
    ],
)
def test_a_name_stands_for_a_layer(block, layer, options):
    model = insert(plain_backbone(), {"1": block}, example_input=images(32))
    assert type(model[1].kfde) is layer
    assert {name: getattr(model[1].kfde, name) for name in options} == options


def test_names_and_pairs_come_from_yaml():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    blocks = yaml.safe_load("{'1': CSFE, '2': [MFDF, {kernel_sizes: [3, 5]}]}")
    model = insert(plain_backbone(), blocks, example_input=images(32), identity_start=True)
    assert isinstance(model[1].kfde, Blend)
    assert model[2].kfde.block.kernel_sizes == (3, 5)


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        ("csfe", ValueError, "the block at '1' must be one of CFE, SFE, CSFE, MFDF, got 'csfe'"),
        ("SE", ValueError, "the block at '1' must be one of CFE, SFE, CSFE, MFDF, got 'SE'"),
        (("Conv2d", {}), ValueError, "must be one of CFE, SFE, CSFE, MFDF, got 'Conv2d'"),
        (("CSFE",), TypeError, r"a pair of such a name and a dict of options, got \('CSFE',\)"),
        (["CSFE", {}, 1], TypeError, "a pair of such a name and a dict of options"),
        (("CSFE", "sum"), TypeError, "a pair of such a name and a dict of options"),
        ((CSFE, {}), TypeError, "a pair of such a name and a dict of options"),
        ([], TypeError, "a pair of such a name and a dict of options"),
        ({"CSFE": {}}, TypeError, "a pair of such a name and a dict of options"),
        (None, TypeError, "a pair of such a name and a dict of options, got None"),
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
