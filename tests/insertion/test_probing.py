import copy
import tempfile

import pytest
import timm
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from kfde_layers import CSFE, SFE, insert, insertion_points
from kfde_layers.insertion import Point
from tests.support.inputs import images
from tests.support.networks import Patches, each_host, make_host, plain_backbone


@each_host
def test_points_are_named_with_channels_reduction_and_layout(make, points, side):
    model = make_host(make)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.train().modules()]
    all_points = insertion_points(model, example_input=images(side, 1))
    assert {name: all_points[name] for name in points} == {name: Point(*point) for name, point in points.items()}
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    if hasattr(model, "feature_info"):
        assert list(all_points) == [info["module"] for info in model.feature_info]
        assert [point.channels for point in all_points.values()] == [info["num_chs"] for info in model.feature_info]
        assert [point.reduction for point in all_points.values()] == [info["reduction"] for info in model.feature_info]


def test_the_example_is_guessed_from_the_first_convolution():
    model = nn.Sequential(nn.Conv2d(5, 16, 3, stride=2, padding=1), nn.ReLU())
    assert insertion_points(model) == {"0": Point(16, 2, "NCHW"), "1": Point(16, 2, "NCHW")}
    assert insertion_points(timm.create_model("resnet18", in_chans=1))["layer1"] == Point(64, 4, "NCHW")


@pytest.mark.parametrize(("height", "width"), [(460, 700), (230, 350), (100, 60), (65, 33), (224, 224), (32, 32)])
def test_maps_of_any_image_are_recognised(height, width):
    """A stride rounds each side of the map by itself, so that the two sides shrink by slightly different factors."""
    points = insertion_points(timm.create_model("resnet18"), example_input=torch.zeros(1, 3, height, width))
    assert [point.reduction for point in points.values()] == [2, 4, 8, 16, 32]
    assert {point.layout for point in points.values()} == {"NCHW"}


def test_an_oblong_example_distinguishes_the_layouts():
    class Transposed(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    model = nn.Sequential(nn.Conv2d(3, 24, 1), Transposed())
    x = torch.zeros(1, 3, 24, 24)  # as high and wide as it has channels: the layout is ambiguous
    assert insertion_points(model, example_input=x)["1"].layout == "NCHW"
    x = torch.zeros(1, 3, 24, 48)
    assert insertion_points(model, example_input=x) == {"0": Point(24, 1, "NCHW"), "1": Point(24, 1, "NHWC")}


def test_tokens_that_are_no_map_are_no_point():
    """The 20 tokens cannot be a map: a square image gives no map of 4 x 5."""
    model = nn.Sequential(nn.Conv2d(3, 20, 4, stride=4), nn.Flatten(2))
    assert list(insertion_points(model, example_input=images(64, 1))) == ["0"]


def in_process_group(wrap):
    def wrap_in_group(model):
        with tempfile.NamedTemporaryFile() as file:
            torch.distributed.init_process_group(
                "gloo", store=torch.distributed.FileStore(file.name), rank=0, world_size=1
            )
            try:
                return wrap(model)
            finally:
                torch.distributed.destroy_process_group()

    return wrap_in_group


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "model must not be wrapped yet, got DataParallel: insert first, wrap then"),
        (
            in_process_group(nn.parallel.DistributedDataParallel),
            "must not be wrapped yet, got DistributedDataParallel: insert",
        ),
        (in_process_group(fully_shard), "model must not be wrapped yet, got FSDPModule: insert first, wrap then"),
        (torch.compile, "model must not be compiled yet, got a compiled one: insert first, compile then"),
        (lambda model: model.compile() or model, "model must not be compiled yet, got a compiled one: insert first"),
        (
            lambda model: nn.Sequential(torch.compile(model)),
            r"got a compiled one \(at '0'\): insert first, compile then",
        ),
        (torch.jit.script, "model must not be scripted yet, got a ScriptModule: insert first, script then"),
    ],
)
def test_a_wrapped_model_is_refused_with_what_to_do_first(wrap, message):
    model = wrap(nn.Sequential(nn.Conv2d(3, 4, 1)))
    for call in (insertion_points, lambda model: insert(model, {"0": SFE})):
        with pytest.raises(ValueError, match=message):
            call(model)


class SideEffects(nn.Module):
    """Count calls, draw random numbers, and change when set to eval mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("count", torch.zeros(()))
        self.merged = False

    def train(self, mode=True):
        self.merged |= not mode
        return super().train(mode)

    def forward(self, x):
        self.count += 1
        return self.conv(x + torch.randn_like(x))


def test_probing_leaves_no_trace():
    model, block = SideEffects(), nn.BatchNorm2d(4)
    state = torch.get_rng_state()
    insertion_points(model, example_input=images(8))
    insert(model, {"conv": block}, example_input=images(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.count == 0
    assert not model.merged
    assert model.training
    assert block.num_batches_tracked == 0


def test_probing_under_autocast_gives_the_block_the_dtype_of_the_model():
    with torch.autocast("cpu", torch.bfloat16):
        model = insert(plain_backbone(), {"1": CSFE})
    assert model[1].kfde.cfe.weight.dtype == torch.float32


def test_ambiguous_tokens_are_refused():
    """25 tokens: one and then 4 x 6 of 8 px, or five and then 4 x 5 of nearly 9 px."""
    model, x = Patches(1, declared=False), torch.zeros(1, 3, 32, 48)
    model.conv = nn.Conv2d(3, 8, 8, stride=8)
    with pytest.raises(ValueError, match="its 25 tokens may stand for a map behind 1 or 5 prefix tokens; a square"):
        insert(model, {"tokens": SFE}, example_input=x)
    model.num_prefix_tokens = 1
    assert insertion_points(model, example_input=x)["tokens"] == Point(8, 8, "NLC", 1)


def test_models_that_do_not_run_ask_for_an_example():
    with pytest.raises(ValueError, match=r"does not run on an input of shape \(1, 3, 224, 224\); pass a fitting"):
        insertion_points(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"example_input is needed: the model has no nn\.Conv2d"):
        insertion_points(nn.Sequential(nn.ReLU()))
