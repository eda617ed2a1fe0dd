"""`insert` in the smallest model of each of timm's families, with few blocks and the smallest image that it takes."""

import copy
import functools
import warnings

import pytest
import timm
import torch
from einops import rearrange

from kfde_layers import CSFE, SFE, insert, insertion_points, remove
from kfde_layers.layers import Blend
from kfde_layers.testing import scatter_parameters
from tests.support.inputs import draw
from tests.support.networks import fill_zero_weights

pytestmark = pytest.mark.slow

SIDE = 64  # px

NARROW = {"depth": 3, "embed_dim": 96, "num_heads": 3}  # options of a vision transformer
SHALLOW = {"depths": (1, 1, 1, 1)}

# family -> the smallest model, and the options that make it smaller and let it take an image of SIDE
FAMILIES = {
    "beit": ("beit_base_patch16_224", {"img_size": SIDE, **NARROW}),
    "byoanet": ("lambda_resnet26t", {}),
    "byobnet": ("test_byobnet", {}),
    "cait": ("cait_xxs24_224", {"img_size": SIDE, "depth": 3}),
    "coat": ("coat_tiny", {"img_size": SIDE}),
    "convit": ("convit_tiny", {"img_size": SIDE}),
    "convmixer": ("convmixer_768_32", {}),
    "convnext": ("test_convnext", {}),
    "cpubone": ("cpubone_nano", {}),
    "crossvit": ("crossvit_tiny_240", {"depth": ((1, 2, 0),) * 3}),
    "csatv2": ("csatv2", {}),
    "cspnet": ("cs3darknet_focus_s", {}),
    "cspnext": ("cspnext_tiny", {}),
    "davit": ("davit_tiny", SHALLOW),
    "deepseek_vit": ("deepseek_vit_412m", NARROW),
    "deit": ("deit_tiny_patch16_224", {"img_size": SIDE}),
    "densenet": ("densenet121", {}),
    "dla": ("dla46x_c", {}),
    "dpn": ("dpn48b", {}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer": ("efficientformer_l1", {}),
    "efficientformer_v2": ("efficientformerv2_s0", {"img_size": SIDE}),
    "efficientnet": ("test_efficientnet", {}),
    "efficientvim": ("efficientvim_m1", {}),
    "efficientvit_mit": ("efficientvit_b0", {}),
    "efficientvit_msra": ("efficientvit_m0", {}),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", {}),
    "fasternet": ("fasternet_t0", {}),
    "fastvit": ("fastvit_t8", {}),
    "focalnet": ("focalnet_tiny_srf", {}),
    "gcvit": ("gcvit_xxtiny", {"img_size": SIDE}),
    "gemma4_vit": ("gemma4_vit_167m", NARROW),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_b", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "hiera": ("hiera_tiny_224", {"img_size": SIDE, "stages": (1, 1, 2, 1)}),
    "hieradet_sam2": ("sam2_hiera_tiny", {"stages": (1, 1, 1, 1)}),
    "hrnet": ("hrnet_w18_small", {}),
    "iformer": ("iformer_t", {}),
    "inception_next": ("inception_next_atto", {}),
    "inception_resnet_v2": ("inception_resnet_v2", {}),
    "inception_v3": ("inception_v3", {}),
    "inception_v4": ("inception_v4", {}),
    "lcnetv2": ("lcnetv2_small", {}),
    "levit": ("levit_128s", {"img_size": SIDE}),
    "lowformer": ("lowformer_b0", {}),
    "mambaout": ("test_mambaout", {}),
    "maxxvit": ("test_coatnet", {"img_size": SIDE}),
    "metaformer": ("poolformerv2_s12", {}),
    "mlp_mixer": ("gmlp_ti16_224", {"img_size": SIDE}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "mobilenetv5": ("mobilenetv5_base", {"channel_multiplier": 0.25}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": ("mvitv2_tiny", {}),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", NARROW),
    "nasnet": ("nasnetalarge", {}),
    "nest": ("nest_tiny", {"img_size": SIDE}),
    "nextvit": ("nextvit_small", {}),
    "nfnet": ("test_nfnet", {}),
    "pit": ("pit_ti_224", {}),
    "pnasnet": ("pnasnet5large", {}),
    "pvt_v2": ("pvt_v2_b0", {}),
    "qwen3_vit": ("qwen3_vit_88m", {"depth": 3}),
    "rdnet": ("rdnet_tiny", {}),
    "regnet": ("regnetx_002", {}),
    "repghost": ("repghostnet_050", {}),
    "repvit": ("repvit_m1", {}),
    "res2net": ("res2next50", {"layers": (1, 1, 1, 1)}),
    "resnest": ("resnest14d", {}),
    "resnet": ("test_resnet", {}),
    "resnetv2": ("resnetv2_18", {}),
    "rexnet": ("rexnet_100", {}),
    "selecsls": ("selecsls42", {}),
    "senet": ("legacy_seresnet18", {}),
    "sequencer": ("sequencer2d_s", {"layers": (1, 1, 1, 1)}),
    "shvit": ("shvit_s1", {}),
    "sknet": ("skresnet18", {}),
    "starnet": ("starnet_s050", {}),
    "swiftformer": ("swiftformer_xs", {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {"img_size": SIDE, **SHALLOW}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {"img_size": SIDE, **SHALLOW}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", {"img_size": SIDE, **SHALLOW}),
    "tiny_vit": ("tiny_vit_5m_224", SHALLOW),
    "tnt": ("tnt_s_legacy_patch16_224", {"img_size": SIDE, "depth": 3}),
    "tresnet": ("tresnet_m", {"layers": (1, 1, 1, 1)}),
    "twins": ("twins_svt_small", {}),
    "vgg": ("vgg11", {"mlp_ratio": 1 / 32}),
    "visformer": ("visformer_tiny", {"img_size": SIDE, "depth": (1, 1, 1)}),
    "vision_transformer": ("test_vit", {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": SIDE}),
    "vision_transformer_relpos": ("test_vit_relpos", {"img_size": SIDE}),
    "vision_transformer_sam": ("samvit_base_patch16_224", {"img_size": SIDE, "global_attn_indexes": (2,), **NARROW}),
    "vitamin": ("vitamin_small_224", {"img_size": SIDE, "depth": 3}),
    "volo": ("volo_d1_224", {"img_size": SIDE}),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
    "xception": ("legacy_xception", {}),
    "xception_aligned": ("xception41p", {}),
    "xcit": ("xcit_nano_12_p8_224", {"depth": 3}),
}
# Their convolutions have no padding, which shrinks a map by more than their strides do: 299 px to 8 and not to 9.3.
UNPADDED = ("inception_resnet_v2", "inception_v3", "inception_v4")
LARGER = {  # px, where the model takes no less
    "crossvit": 240,
    "deepseek_vit": 224,
    "efficientformer": 224,
    "gemma4_vit": 96,
    "pit": 224,
    "sequencer": 224,
    **dict.fromkeys(UNPADDED, 107),
}
# Families whose forward pass calls no module of their feature_info: among all submodules, the ends of stages.
CHOSEN = {
    "coat": ["serial_blocks1.1", "serial_blocks2.1", "serial_blocks3.1"],
    "gemma4_vit": ["encoder.blocks.0", "encoder.blocks.1", "encoder.blocks.2"],
    "mvitv2": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "twins": ["blocks.0.1", "blocks.1.1", "blocks.2.9", "blocks.3.3"],
}
REFUSED = {
    "hiera": "its tokens are sorted into mask units, not by rows of the image",
}
TABLE = "timm families"


def make_model(family, **kwargs):
    name, options = FAMILIES[family]
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    model = timm.create_model(name, **options, **kwargs).eval()
    return fill_zero_weights(model)


class Host:
    """A model, its image, and the points in it that take an even number of channels."""

    def __init__(self, family):
        side = LARGER.get(family, SIDE)
        self.family = family
        self.x = draw(1, 3, side, side, dtype=torch.float32)
        self.original = make_model(family, num_classes=5)
        x = draw(1, 3, 299, 299, dtype=torch.float32) if family in UNPADDED else self.x  # less rounds reductions away
        self.points = insertion_points(self.original, example_input=x)
        self.names = CHOSEN.get(family, [name for name, point in self.points.items() if point.channels % 2 == 0])
        with torch.no_grad():
            self.expected = self.original(self.x)

    @functools.cached_property
    def full(self):
        """The model with a CSFE at every point, each of which starts as the identity, and the warnings of `insert`.

        It takes many forward passes to make, so the tests share it: they change copies only.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            blocks = dict.fromkeys(self.names, CSFE)
            model = insert(copy.deepcopy(self.original), blocks, example_input=self.x, identity_start=True)
        return model, " ".join(str(warning.message) for warning in caught)


@pytest.fixture(scope="module")
def host(request):
    return Host(request.param)


def cell(column):
    """Run a test for each family, with a mark for the cell in its row."""
    families = [pytest.param(family, marks=pytest.mark.cell(TABLE, family, column)) for family in FAMILIES]
    return pytest.mark.parametrize("host", families, indirect=True)


def test_the_table_holds_nearly_every_family_of_this_timm():
    # other tests of this process may have registered models of their own
    families = {name for name in timm.list_modules() if timm.list_models(module=name) and hasattr(timm.models, name)}
    assert len(families & FAMILIES.keys()) >= 0.95 * len(families)
    assert len(REFUSED) <= 0.05 * len(FAMILIES)


@cell("points")
def test_points_are_what_timm_declares(host, record_property):
    declared = {info["module"]: info for info in reversed(host.original.feature_info)}
    for name, point in host.points.items():
        assert host.family in CHOSEN or host.family in REFUSED or name in declared
        if name in declared and host.family != "hrnet":  # which returns a list of maps, the first of them the largest
            assert point.channels == declared[name]["num_chs"]
            shrunk = 1.2 if host.family in UNPADDED else 1
            assert declared[name]["reduction"] <= point.reduction <= shrunk * declared[name]["reduction"]
    assert host.names
    layouts = sorted({host.points[name].layout for name in host.names})
    of = f"of {len(declared)}" if declared.keys() & host.points.keys() else "submodules"
    record_property("note", f"{len(host.points)} {of}, {' and '.join(layouts)}")
    if host.family in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[host.family]):
            insert(host.original, {next(iter(declared)): SFE}, example_input=host.x)
        record_property("limit", f"{', '.join(declared)} are refused, since of each {REFUSED[host.family]}")


@cell("starts equal")
@torch.no_grad()
def test_identity_start_leaves_outputs_equal_and_remove_gives_the_original_model_back(host):
    keys = list(host.original.state_dict())
    model = copy.deepcopy(host.full[0])
    assert torch.equal(model(host.x), host.expected)
    added = set(model.state_dict()) - set(keys)
    assert all(any(key.startswith(f"{name}.kfde.") for name in host.names) for key in added)
    assert all(any(key.startswith(f"{name}.kfde.") for key in added) for name in host.names)
    result = model.load_state_dict(host.original.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == added
    for name in host.names:
        scatter_parameters(model.get_submodule(f"{name}.kfde"))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(host.x), model(host.x))
    remove(copied).load_state_dict(host.original.state_dict())
    assert list(copied.state_dict()) == keys
    assert not any(module._forward_hooks for module in copied.modules())
    assert torch.equal(copied(host.x), host.expected)


@cell("trains")
def test_blocks_train_wherever_the_output_depends_on_their_map(host, record_property):
    model, warned = copy.deepcopy(host.full[0]), host.full[1]
    without_effect = [name for name in host.names if f"{name!r}: the block there will not change it" in warned]
    cotangent = draw(*host.expected.shape, seed=1, dtype=torch.float32)
    added = {name: parameter for name, parameter in model.named_parameters() if ".kfde." in name}
    optimizer = torch.optim.Adam(added.values(), lr=0.1)
    for _ in range(2):  # a blend of zero stops the block's gradients in the first step
        optimizer.zero_grad()
        (model(host.x) * cotangent).sum().backward()
        optimizer.step()
    for name, parameter in added.items():
        dead = parameter.grad is None or not parameter.grad.any()
        assert dead == (name.split(".kfde.")[0] in without_effect), name
    if without_effect:
        record_property("limit", f"features alone come from {', '.join(without_effect)}")


def assert_first_changed(before, after, index):
    """Check that maps before `index` are equal, that the one there went through SFE, and that all shapes are equal."""
    assert [feature_map.shape for feature_map in before] == [feature_map.shape for feature_map in after]
    assert all(map(torch.equal, before[:index], after[:index]))
    original, changed = before[index], after[index]
    assert not torch.equal(original, changed)
    if original.shape[1] == original.shape[2] != original.shape[3]:
        original, changed = (rearrange(x, "n h w c -> n c h w") for x in (original, changed))
    torch.testing.assert_close(changed, SFE()(original), rtol=1e-4, atol=1e-5 * float(original.abs().max()))


def middle(host):
    """Return a point in the middle, and the index of its map among timm's feature maps."""
    names = CHOSEN.get(host.family, [info["module"] for info in host.original.feature_info])
    index = next(i for i in (names.index(names[len(names) // 2]), *range(len(names))) if names[i] in host.names)
    return names[index], index


# In these families timm takes a map at another place than the output of the module that it declares for it.
ELSEWHERE = {
    "coat": "no module returns the maps that timm takes, which have run through several blocks in parallel",
    "hiera": REFUSED["hiera"],
    "hrnet": "timm takes the maps after modules that follow those that it declares for them",
    "nasnet": "timm takes the map before the module that it declares for it",
    "pnasnet": "timm takes the map before the module that it declares for it",
    "xception": "timm takes the map before the module that it declares for it",
}


@cell("forward_intermediates")
@torch.no_grad()
def test_intermediates_come_with_the_block(host, record_property):
    name, index = middle(host) if host.family != "hiera" else (host.names[0], 0)
    model = copy.deepcopy(host.full[0])
    for part in model.get_submodule(f"{name}.kfde").modules():
        if isinstance(part, Blend):  # at a weight of 1 it is its block, and all the others are still the identity
            part.block = SFE()
            part.blend.fill_(1)
    before, after = (m.forward_intermediates(host.x, intermediates_only=True) for m in (host.original, model))
    if host.family in ELSEWHERE:
        record_property("limit", ELSEWHERE[host.family])
        assert not torch.equal(before[-1], after[-1])
    else:
        assert_first_changed(before, after, index)


@cell("features_only")
@torch.no_grad()
def test_features_come_with_the_block(host, record_property):
    name, index = middle(host) if host.family != "hiera" else (host.names[0], 0)
    first = int(host.family == "tresnet")  # whose first map timm declares but cannot give
    maps = tuple(range(first, len(host.original.feature_info)))
    model = make_model(host.family, features_only=True, out_indices=maps)
    before = model(host.x)
    modules = dict(model.named_modules())
    spellings = (name, name.replace(".", "_"), name.replace(".", "_", 1), f"model.{name}", f"body.{name}")
    point = next(spelling for spelling in spellings if spelling in modules)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the model's output does not depend")
        insert(model, {point: SFE}, example_input=host.x)
    after = model(host.x)
    if host.family in ("coat", "hiera", "hrnet"):
        record_property("limit", ELSEWHERE[host.family])
        assert not torch.equal(before[-1], after[-1])
    else:
        assert_first_changed(before, after, index - first)
