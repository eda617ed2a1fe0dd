import tempfile

import pytest
import timm
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from kfde_layers import CSFE, SFE, insert, insertion_points
from kfde_layers.insertion import Point
from tests.support.inputs import images
from tests.support.networks import plain_backbone


def test_the_example_is_guessed_from_the_first_convolution():
    model = nn.Sequential(nn.Conv2d(5, 16, 3, stride=2, padding=1), nn.ReLU())
    assert insertion_points(model) == {"0": Point(16, 2, "NCHW"), "1": Point(16, 2, "NCHW")}
    assert insertion_points(timm.create_model("resnet18", in_chans=1))["layer1"] == Point(64, 4, "NCHW")


def test_models_that_do_not_run_ask_for_an_example():
    with pytest.raises(ValueError, match=r"does not run on an input of shape \(1, 3, 224, 224\); pass an example"):
        insertion_points(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"example_input is needed: the model has no nn\.Conv2d"):
        insertion_points(nn.Sequential(nn.ReLU()))


class Declaring(nn.Sequential):
    """A network with attributes."""

    def __init__(self, *parts, **attributes):
        super().__init__(*parts)
        self.__dict__.update(attributes)


class Failing(nn.Conv2d):
    @property
    def img_size(self):
        raise NotImplementedError


CONFIG = {"input_size": (3, 64, 48)}


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (Declaring(nn.Conv2d(3, 4, 1), img_size=32), (32, 32)),
        (Declaring(nn.Conv2d(3, 4, 1), img_size=[32, 16], pretrained_cfg=CONFIG), (32, 16)),
        (nn.Sequential(Declaring(nn.Conv2d(3, 4, 1), img_size=(16, 32))), (16, 32)),
        (Declaring(Declaring(Declaring(nn.Conv2d(3, 4, 1), img_size=16)), pretrained_cfg=CONFIG), (64, 48)),
        (nn.Sequential(nn.Sequential(Declaring(nn.Conv2d(3, 4, 1), image_size=40))), (40, 40)),
        (Declaring(Failing(3, 4, 1), pretrained_cfg=CONFIG), (64, 48)),
        (Declaring(nn.Conv2d(3, 4, 1), img_size="large", image_size=(0, 3)), (224, 224)),
    ],
)
def test_the_example_has_the_size_that_is_declared(model, size):
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    insertion_points(model)
    assert seen == [(1, 3, *size)]


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
        (nn.DataParallel, "model must not be wrapped yet, got DataParallel: insert first, then wrap"),
        (
            in_process_group(nn.parallel.DistributedDataParallel),
            "must not be wrapped yet, got DistributedDataParallel: insert",
        ),
        (in_process_group(fully_shard), "model must not be wrapped yet, got FSDPModule: insert first, then wrap"),
        (torch.compile, "model must not be compiled yet, got a compiled module: insert first, then compile"),
        (lambda model: model.compile() or model, "model must not be compiled yet, got a compiled module: insert first"),
        (
            lambda model: nn.Sequential(torch.compile(model)),
            r"got a compiled module \(at '0'\): insert first, then compile",
        ),
        (torch.jit.script, "model must not be scripted yet, got a ScriptModule: insert first, then script"),
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
