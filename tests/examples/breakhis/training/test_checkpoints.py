import json
import os
from argparse import Namespace
from typing import Any

import pytest
import timm
import torch
from breakhis.training.checkpoints import build_model, eval_transform, load_model, save_model, train_transform
from breakhis.training.stain import StainJitter
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import transforms

CREATE = timm.create_model


def make_flags(**changes: Any) -> Namespace:
    """Make the flags of a run that concern the model."""
    defaults = {"model": "kfde_convnextv2_atto", "model_kwargs": {}, "drop_path": None, "pretrained": False}
    defaults |= {"insert": {}, "identity_start": None}
    defaults |= {
        "checkpoint_path": None,
        "img_size": 96,
        "crop_mode": "center",
        "color_jitter": 0.2,
        "stain_jitter": 0.0,
    }
    return Namespace(**defaults | changes)


@pytest.fixture
def created(monkeypatch):
    """Record the arguments of each created model; random weights take the place of a download."""
    calls = []

    def create_model(name, pretrained=False, **arguments):
        calls.append({key: value for key, value in arguments.items() if value is not None} | {"pretrained": pretrained})
        return CREATE(name, pretrained=pretrained and name.startswith("local-dir:"), **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    return calls


def test_a_pretrained_kfde_model_starts_at_its_backbone_and_loads_again(created, tmp_path):
    model, built = build_model(make_flags(pretrained=True), num_classes=2)
    assert created == [{"pretrained": True, "num_classes": 2, "identity_start": True}]
    (tmp_path / "part" / "left").mkdir(parents=True)  # as after a kill
    save_model(model, tmp_path, ["benign", "malignant"], built)
    loaded = load_model(tmp_path)
    assert not loaded.training
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_other_models_are_not_changed_and_own_weights_have_no_licence(created, tmp_path):
    build_model(make_flags(model="convnextv2_atto", pretrained=True), num_classes=8)
    assert created == [{"pretrained": True, "num_classes": 8}]
    model, built = build_model(make_flags(), num_classes=8)
    assert built == {"model_args": {}}
    save_model(model, tmp_path, "abcdefgh", built)
    config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert not {"license", "tag", "test_input_size", "test_crop_pct"} & config.keys()
    assert config["input_size"] == [3, 96, 96]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pretrained": True, "model_kwargs": {"csfe": False, "mfdf": False}}, {}),  # no block to blend
        ({"pretrained": True, "model_kwargs": {"identity_start": False}}, {"identity_start": False}),
        ({"drop_path": 0.0}, {"drop_path_rate": 0.0}),
        ({"model": "vit_tiny_patch16_224"}, {"img_size": 96}),  # its positions have a fixed size
    ],
)
def test_flags_become_arguments_of_the_model(created, changes, expected):
    _, built = build_model(make_flags(**changes), num_classes=2)
    assert {key: value for key, value in built["model_args"].items() if key not in ("csfe", "mfdf")} == expected
    assert {key: created[0].get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("donor", "kwargs", "blended"),
    [
        ("convnextv2_atto", {}, True),
        ("kfde_convnextv2_atto", {"identity_start": True}, True),
        ("kfde_convnextv2_atto", {}, False),  # as trained from random weights
    ],
)
def test_weights_from_a_file_start_training_with_any_number_of_classes(tmp_path, donor, kwargs, blended):
    source = timm.create_model(donor, num_classes=5, **kwargs)
    path = tmp_path / "donor.pth"
    torch.save(source.state_dict(), path)
    model, built = build_model(make_flags(checkpoint_path=path), num_classes=2)
    assert built == {"model_args": {"identity_start": blended}}
    assert model.pretrained_cfg["file"] is None  # loading the trained model must not look for it
    assert model.pretrained_cfg["license"] == "cc-by-nc-4.0"  # the file's weights may come from ImageNet's
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(model.eval().forward_features(images), source.eval().forward_features(images))
    assert model.get_classifier().out_features == 2


def test_arguments_and_weights_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"model kfde_convnextv2_atto with arguments {'foo': 1} cannot be built: .*foo"
    ):
        build_model(make_flags(model_kwargs={"foo": 1}), num_classes=2)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"cannot be built: The checkpoint does not fit the model"):
        build_model(make_flags(checkpoint_path=tmp_path / "other.pth"), num_classes=2)


INSERTED = {"layer2": "se", "layer3": ["csfe", {"mfdf": {"groups": 1, "norm_layer": "batchnorm2d"}}]}


@pytest.mark.parametrize("identity_start", [True, False, None])
def test_inserted_blocks_are_saved_and_loaded(identity_start, tmp_path):
    torch.manual_seed(0)
    plain, _ = build_model(make_flags(model="test_resnet"), num_classes=2)
    torch.manual_seed(0)
    flags = make_flags(model="test_resnet", insert=INSERTED, identity_start=identity_start)
    model, built = build_model(flags, num_classes=2)
    assert built["inserted"] == {"blocks": INSERTED, "identity_start": bool(identity_start)}
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(model.eval()(images), plain.eval()(images)) == bool(identity_start)
    save_model(model, tmp_path, ["benign", "malignant"], built)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert torch.equal(loaded(images), model(images))
    with pytest.raises(RuntimeError, match="Unexpected key"):  # timm alone does not know of the blocks
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_inserted_blocks_start_as_the_identity_with_weights_unless_told_otherwise(tmp_path):
    path = tmp_path / "donor.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    for identity_start, expected in ((None, True), (False, False)):
        flags = make_flags(model="test_resnet", checkpoint_path=path, insert=INSERTED, identity_start=identity_start)
        assert build_model(flags, num_classes=2)[1]["inserted"]["identity_start"] == expected


@pytest.mark.parametrize("identity_start", [True, False])
def test_the_blocks_of_a_kfde_model_start_as_told(identity_start):
    _, built = build_model(make_flags(identity_start=identity_start), num_classes=2)
    assert built == {"model_args": {"identity_start": identity_start}}


@pytest.mark.parametrize(
    ("insert", "message"),
    [
        ({"layer9": "se"}, "--insert must fit model test_resnet, got {'layer9': 'se'}: .*'layer9'"),
        ({"layer3": "nonesuch"}, "--insert must fit .* one of CFE, .* got 'nonesuch'"),
        ({"layer3": {"mfdf": {"kernel_sizes": [2]}}}, "--insert must fit .* kernel_sizes must be odd"),
    ],
)
def test_blocks_that_do_not_fit_are_named(insert, message):
    with pytest.raises(ValueError, match=message):
        build_model(make_flags(model="test_resnet", insert=insert), num_classes=2)


@pytest.mark.parametrize(
    ("inserted", "message"),
    [
        (3, "config.json must say what was inserted: inserted must have blocks, a mapping, and identity_start, a bool"),
        ({"blocks": {"layer3": "se"}}, "must say what was inserted"),
        ({"blocks": ["se"], "identity_start": True}, "must say what was inserted"),
        ({"blocks": {"layer3": "se"}, "identity_start": 1}, "must say what was inserted"),
        ({"blocks": {"layer9": "se"}, "identity_start": True}, "config.json must describe a model that timm can build"),
        ({"blocks": {"layer2": "se"}, "identity_start": False}, "must hold the weights of its config.json's model"),
        ({"blocks": {}, "identity_start": False}, "must hold the weights of its config.json's model"),
    ],
)
def test_a_file_that_says_something_else_was_inserted_is_refused(inserted, message, tmp_path):
    model, built = build_model(make_flags(model="test_resnet", insert=INSERTED), num_classes=2)
    save_model(model, tmp_path, ["benign", "malignant"], built)
    config = json.loads((tmp_path / "config.json").read_text()) | {"inserted": inserted}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


@pytest.fixture
def saved(tmp_path):
    """A small model of two classes, as a run saves it."""
    model, built = build_model(make_flags(model="test_resnet"), num_classes=2)
    save_model(model, tmp_path / "best", ["benign", "malignant"], built)
    return tmp_path / "best"


def change_config(folder, **changes):
    """Change entries of `config.json`, or inner ones of its `pretrained_cfg`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        (config if name in config else config["pretrained_cfg"])[name] = value
    path.write_text(json.dumps(config))


def test_a_saved_model_is_loaded_with_all_its_weights(saved):
    weights = load_file(saved / "model.safetensors")
    torch.testing.assert_close(dict(load_model(saved).state_dict()), weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # timm alone would load these with a random classifier, or with random weights
        (
            {"num_classes": 3, "label_names": ["a", "b", "c"], "model_args": {"num_classes": 2}},
            "must have num_classes 2, as its model, got 3",
        ),
        (
            {"num_classes": 3, "label_names": ["a", "b", "c"]},
            r"must hold the weights of its config.json's model exactly: fc.bias must be of shape \(3,\), got",
        ),
        ({"architecture": "test_efficientnet"}, "must hold the weights of its config.json's model exactly: "),
        ({"architecture": "resnet18"}, r"exactly: conv1.weight is missing, .* and \d+ more"),
        ({"model_args": {"foo": 1}}, "config.json must describe a model that timm can build, got .*foo"),
        ({"model_args": 7}, "config.json must describe a model that timm can build, got "),
        ({"model_args": {"in_chans": 1}}, "must hold the weights"),
        ({"interpolation": "magic"}, "config.json must have interpolation of .*, got 'magic'"),
        ({"crop_pct": "all"}, "config.json must have crop_pct from 0.5 to 1, got 'all'"),
        ({"model_args": {"global_pool": ""}}, "config.json must describe how images become inputs of its model, got "),
    ],
)
def test_a_configuration_that_is_not_that_of_the_weights_is_refused(saved, changes, message):
    change_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


def test_weights_that_are_not_those_of_the_configuration_are_refused(saved):
    path = saved / "model.safetensors"
    weights = load_file(path)
    for changes, message in (
        ({"fc.bias": torch.tensor([0.0, torch.nan])}, "finite weights, got nan in fc.bias"),
        ({"fc.bias": torch.zeros(5)}, r"fc.bias must be of shape \(2,\), got \(5,\)"),
        ({"fc.scale": torch.zeros(5)}, "fc.scale is left over"),
    ):
        save_file(weights | changes, path)
        with pytest.raises(ValueError, match=rf"model.safetensors must hold .*{message}"):
            load_model(saved)
    save_file({key: value for key, value in weights.items() if key != "fc.bias"}, path)
    with pytest.raises(ValueError, match=r"exactly: fc.bias is missing"):
        load_model(saved)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors must be a checkpoint of weights, got SafetensorError: "):
        load_model(saved)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_files_have_the_mode_of_the_users_umask(tmp_path, mask):
    model, built = build_model(make_flags(model="test_resnet"), num_classes=2)
    before = os.umask(mask)
    try:
        save_model(model, tmp_path / "best", ["a", "b"], built)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "best").iterdir()}
    assert modes == dict.fromkeys(["config.json", "model.safetensors"], 0o666 & ~mask)


def test_a_full_disk_keeps_the_model_of_before(saved, monkeypatch):
    def fail(model, folder, **kwargs):
        (saved / "part").mkdir()
        (saved / "part" / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    monkeypatch.setattr("breakhis.training.checkpoints.save_for_hf", fail)
    with pytest.raises(OSError, match=r"best must have room for the model, which cannot be written: .*No space left"):
        save_model(load_model(saved), saved, ["a", "b"], {})
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_kwargs": {"depths": "abc"}}, "with arguments {'depths': 'abc'} cannot be built: "),
        ({"model_kwargs": {"act_layer": "nonsense"}}, "cannot be built: 'nonsense'"),
        ({"model": "test_convnext.nonesuch"}, "cannot be built: Invalid pretrained tag"),
        ({"model_kwargs": {"global_pool": ""}}, r"classify images of 96 px into 2 classes, got .*shape \(1, 2, 3, 3\)"),
        ({"model_kwargs": {"device": "meta"}}, "classify images of 96 px into 2 classes, got .*meta"),
        ({"model": "coat_tiny"}, "got ValueError.*share memory: safetensors cannot hold them"),
        ({"model": "inception_v3", "img_size": 32}, "classify images of 32 px into 2 classes, got RuntimeError"),
    ],
)
def test_a_model_that_cannot_classify_the_images_is_refused_before_training(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(make_flags(**{"model": "test_convnext"} | changes), num_classes=2)


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "kfde_convnextv2_atto"])
def test_a_file_that_does_not_fill_the_backbone_starts_no_training(model, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "donor.pth")
    with pytest.raises(ValueError, match=r"donor.pth must hold weights of all of the model|does not fit the model"):
        build_model(make_flags(model=model, checkpoint_path=tmp_path / "donor.pth"), num_classes=2)


@pytest.mark.parametrize(
    ("crop_mode", "seen"), [("center", [False, True]), ("squash", [True, True]), ("border", [True, True])]
)
def test_evaluation_sees_the_field_or_its_centre(crop_mode, seen, tmp_path):
    """One field has a white mark at its left edge, the other one in its centre."""
    model, built = build_model(make_flags(model="test_resnet", crop_mode=crop_mode), num_classes=2)
    save_model(model, tmp_path, ["a", "b"], built)
    transform = eval_transform(load_model(tmp_path))
    black = transform(Image.new("RGB", (700, 460)))
    found = []
    for left in (0, 320):
        field = Image.new("RGB", (700, 460))
        field.paste("white", (left, 200, left + 60, 260))
        found.append(not torch.allclose(transform(field), black))
    assert found == seen


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_tried_without_a_trace(training, monkeypatch):
    """Neither its mode, its buffers nor the random numbers after it depend on the trial."""
    modes, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **kwargs).train(training))
    torch.manual_seed(0)
    expected, number = create("test_resnet", num_classes=2).state_dict(), torch.rand(1)
    torch.manual_seed(0)
    model, _ = build_model(make_flags(model="test_resnet"), num_classes=2)
    assert torch.equal(torch.rand(1), number)
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    modes += [module.training for module in model.modules()]
    assert set(modes) == {training}


def test_evaluation_is_deterministic_and_sees_the_whole_height():
    model, _ = build_model(make_flags(img_size=46), num_classes=2)
    field = Image.new("RGB", (70, 46))
    field.paste((255, 255, 255), (0, 0, 70, 1))  # a bright first row
    field.paste((255, 255, 255), (0, 45, 70, 46))  # and last
    first, second = (eval_transform(model)(field) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (3, 46, 46)
    rows = first.mean(dim=(0, 2))
    assert rows[0] == rows[-1] == rows.max()
    assert rows[1:-1].max() < rows[0]


@pytest.mark.parametrize("size", [(70, 46), (46, 46)])
def test_augmentation_varies_and_zooms_little(size):
    model, _ = build_model(make_flags(img_size=46), num_classes=2)
    torch.manual_seed(0)
    # A dot of 10 px in a field 46 px high: its share of the crop shows how far the crop zooms in.
    field = Image.new("RGB", size)
    field.paste((255, 255, 255), (size[0] // 2 - 5, 18, size[0] // 2 + 5, 28))
    transform = train_transform(make_flags(), model, field)
    shares = []
    for _ in range(40):
        crop = transform(field).mean(dim=0)
        shares.append(((crop > 0).float().mean() * 46**2 / 100).item())
    complete = [share for share in shares if share > 0.9]  # the border did not cut the dot
    assert len(set(shares)) > 5
    assert max(shares) < 2.3  # 1.4 squared, and a blurred edge
    assert len(complete) > 20


def test_jitter_is_off_without_its_flag():
    model, _ = build_model(make_flags(), num_classes=2)
    field = Image.new("RGB", (70, 46), (200, 120, 160))

    def steps(**jitters: float) -> list[type[nn.Module]]:
        kinds = [type(step) for step in train_transform(make_flags(**jitters), model, field).transforms]
        return [kind for kind in kinds if kind in (StainJitter, transforms.ColorJitter)]

    assert steps(color_jitter=0, stain_jitter=0) == []
    assert steps(color_jitter=0.1, stain_jitter=0) == [transforms.ColorJitter]
    assert steps(color_jitter=0.1, stain_jitter=0.1) == [StainJitter, transforms.ColorJitter]
