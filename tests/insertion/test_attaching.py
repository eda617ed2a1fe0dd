import copy
import functools
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from kfde_layers import CFE, CSFE, MFDF, SFE, insert, insertion_points, remove
from kfde_layers.layers import Blend
from kfde_layers.testing import scatter_parameters
from tests.support.inputs import images
from tests.support.networks import HOSTS, each_host, make_host, model_with_alias, plain_backbone, replace_output


@each_host
def test_blocks_run_after_their_points(make, points, side):
    original, x = make_host(make), images(side)
    model = insert(copy.deepcopy(original), dict.fromkeys(points, CSFE), example_input=x)
    for name in points:
        scatter_parameters(model.get_submodule(name).kfde)
        replace_output(original.get_submodule(name), model.get_submodule(name).kfde)
    torch.testing.assert_close(model(x), original(x))
    changed, unchanged = model(x), make_host(make)(x)
    assert (changed - unchanged).norm() > 0.01 * unchanged.norm()


@each_host
def test_identity_start_leaves_the_outputs_equal_and_then_trains(make, points, side):
    original, x = make_host(make), images(side)
    blocks = dict(zip(points, (CSFE, MFDF), strict=True))
    model = insert(make_host(make), blocks, example_input=x, identity_start=True)
    assert torch.equal(model(x), original(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    added = [(name, parameter) for name, parameter in model.named_parameters() if ".kfde." in name]
    assert added
    for name, parameter in added:
        assert parameter.grad.abs().max() > 0, name


@each_host
def test_the_original_checkpoint_still_loads(make, points, side):
    original = make_host(make)
    model = insert(make_host(make), dict.fromkeys(points, MFDF), example_input=images(side))
    result = model.load_state_dict(original.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys
    assert all(key.startswith(tuple(f"{name}.kfde." for name in points)) for key in result.missing_keys)
    again = insert(make_host(make), dict.fromkeys(points, MFDF), example_input=images(side))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images(side)), model(images(side)))


@each_host
def test_deepcopy_and_pickle(make, points, side):
    model, x = insert(make_host(make), dict.fromkeys(points, CSFE), example_input=images(side)), images(side)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize(("make", "points", "side"), list(HOSTS.values())[:4], ids=list(HOSTS)[:4])
def test_the_rest_of_timms_api_passes_through_the_block(make, points, side):
    original, x = make_host(make), images(side)
    model = insert(make_host(make), dict.fromkeys(points, CSFE), example_input=x)
    for name in points:
        replace_output(original.get_submodule(name), model.get_submodule(name).kfde)
    maps, expected_maps = (m.forward_intermediates(x, intermediates_only=True) for m in (model, original))
    for feature_map, expected_map in zip(maps, expected_maps, strict=True):
        torch.testing.assert_close(feature_map, expected_map)
    torch.testing.assert_close(model.forward_features(x), original.forward_features(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    for name, parameter in model.named_parameters():
        if ".kfde." in name:
            assert parameter.grad.abs().max() > 0, name


def test_inserting_into_a_features_only_model():
    name, x = "resnet18", images(64)
    model = timm.create_model(name, features_only=True).eval()
    before = model(x)
    insert(model, {"layer4": SFE})
    after = model(x)
    assert all(torch.equal(a, b) for a, b in zip(before[:-1], after[:-1], strict=True))
    torch.testing.assert_close(after[-1], SFE()(before[-1]))


def test_blocks_by_class_partial_and_instance():
    model, shared = plain_backbone(), CFE(8)
    insert(model, {"0": SFE, "1": functools.partial(MFDF, kernel_sizes=(3,)), "2": shared})
    assert type(model[0].kfde) is SFE
    assert model[1].kfde.kernel_sizes == (3,)
    assert model[2].kfde is shared


def test_blocks_follow_dtype_device_and_mode_of_their_point():
    model = insert(plain_backbone().to(torch.bfloat16).eval(), {"1": CSFE})
    assert model[1].kfde.cfe.weight.dtype == torch.bfloat16
    assert not model[1].kfde.training
    assert model(images(32).bfloat16()).dtype == torch.bfloat16
    model = insert(plain_backbone().to("meta"), {"1": CSFE})
    assert model[1].kfde.cfe.weight.device.type == "meta"
    assert model[1].kfde.training


@pytest.mark.slow
def test_torchscript_takes_an_inserted_model():
    for name in ("convnextv2_atto", "resnet18"):
        model = timm.create_model(name).eval()
        insert(model, {list(insertion_points(model))[-1]: CSFE})
        torch.testing.assert_close(torch.jit.script(model)(images(64)), model(images(64)), rtol=1e-4, atol=1e-5)


def test_one_module_under_two_names():
    model = model_with_alias()
    before = model(images(16))
    insert(model, {"alias": SFE})
    assert type(model[0].kfde) is SFE
    with pytest.raises(ValueError, match="cannot insert at 'alias': it is the same module as '0'"):
        insert(model_with_alias(), {"0": SFE, "alias": CSFE})
    assert not torch.allclose(model(images(16)), before)


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (["1"], TypeError, r"blocks must be a dict from module names to blocks, got \['1'\] of type list"),
        (
            {"1": 3},
            TypeError,
            "the block at '1' must be a module, a function that makes one .* or a list of these, got 3",
        ),
        ({"1": lambda channels: nn.Flatten()}, ValueError, r"the block at '1' must keep the shape \(1, 32, 56, 56\)"),
        ({"1": CSFE(8)}, ValueError, "the block at '1' does not run .* x must have 8 channels in dimension 1, got 32"),
    ],
)
def test_unfit_blocks_are_refused(blocks, error, message):
    model = plain_backbone()
    with pytest.raises(error, match=message):
        insert(model, blocks)
    assert list(model.state_dict()) == list(plain_backbone().state_dict())


def test_a_point_takes_one_block_and_other_points_stay_free():
    model = insert(plain_backbone(), {"1": SFE})
    with pytest.raises(ValueError, match="cannot insert at '1': it already holds a block"):
        insert(model, {"1": SFE})
    assert list(insertion_points(model)) == ["0.0", "0.1", "0", "1.0", "1.1", "2", "3"]
    insert(model, {"2": CFE})
    assert set(model.state_dict()) - set(plain_backbone().state_dict()) == {"2.kfde.weight", "2.kfde.bias"}
    assert type(model[1].kfde) is SFE


def test_other_hooks_see_the_blocks_output():
    model, outputs = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), []
    model[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    expected = SFE()(model[0](images(8)))
    insert(model, {"0": SFE})
    outputs.clear()
    model(images(8))
    assert torch.equal(outputs[0], expected)


@pytest.mark.slow
def test_remove_leaves_no_trace():
    for make in (lambda: timm.create_model("test_resnet"), lambda: timm.create_model("kfde_convnextv2_atto")):
        original = make().eval()
        model = insert(copy.deepcopy(original), dict.fromkeys(list(insertion_points(original))[:3], CSFE))
        for changed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert remove(changed) is changed
            assert repr(changed) == repr(original)
            assert list(changed.state_dict()) == list(original.state_dict())
            for original_module, module in zip(original.modules(), changed.modules(), strict=True):
                assert module.__dict__.keys() == original_module.__dict__.keys()
                assert not module._forward_hooks
            assert torch.equal(changed(images(64)), original(images(64)))


def test_a_pickled_block_is_not_lost_to_hooks_of_another_process(tmp_path, monkeypatch):
    """PyTorch counts hooks in each process from zero: it must know the numbers of loaded hooks as used."""
    torch.save(insert(timm.create_model("test_convnext").eval(), {"stages.3": SFE}), tmp_path / "model.pt")
    used = RemovableHandle.next_id
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a new process
    model, x = torch.load(tmp_path / "model.pt", weights_only=False), torch.ones(1, 3, 64, 64).cumsum(3)
    before = model(x)
    insertion_points(model)
    for _ in range(used + 1):
        model.stages[3].register_forward_hook(lambda *args: None).remove()
    assert torch.equal(model(x), before)
    assert len(model.stages[3]._forward_hooks) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model: insert(3, {}), TypeError, "model must be a Module, got 3 of type int"),
        (
            lambda model: insert(model, {1: SFE}),
            TypeError,
            "each key of blocks must be a str, got 1 of type int",
        ),
        (
            lambda model: insert(model, {"1": lambda c: c}),
            TypeError,
            "the function for '1' must make a module, got 32 of",
        ),
        (lambda model: insertion_points(model, example_input=(1,)), TypeError, "example_input must be a Tensor"),
        (
            lambda model: insertion_points(model, example_input=torch.zeros(3, 8, 8)),
            ValueError,
            r"example_input must have shape \(N, C, H, W\), got \(3, 8, 8\)",
        ),
        (lambda model: insertion_points(nn.Sequential(nn.LazyConv2d(8, 3))), ValueError, "example_input is needed"),
        (
            lambda model: remove(model, "1"),
            TypeError,
            r"names must be a list of module names, got the string '1': did you mean \['1'\]\?",
        ),
        (lambda model: remove(nn.DataParallel(model)), ValueError, "model must not be wrapped yet, got DataParallel"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(plain_backbone())


def test_remove_takes_every_name_that_insert_takes():
    model = insert(model_with_alias(), {"alias": SFE})
    remove(model, ["alias"])
    assert not any("kfde" in name for name, _ in model.named_modules())


def test_remove_takes_names():
    model = insert(plain_backbone(), {"0": SFE, "1": CFE, "2": SFE})
    remove(model, ["0", "2"])
    assert [name for name, _ in model.named_modules() if "kfde" in name] == ["1.kfde"]
    with pytest.raises(ValueError, match=r"names must be modules into which a block was inserted \('1'\), got '0'"):
        remove(model, ["1", "0"])
    assert type(model[1].kfde) is CFE
    with pytest.raises(ValueError, match=r"inserted \(none in this model\), got 'x'"):
        remove(plain_backbone(), ["x"])


def test_identity_start_inserts_a_blend():
    model = insert(plain_backbone(), {"1": CSFE}, identity_start=True)
    assert type(model[1].kfde) is Blend
