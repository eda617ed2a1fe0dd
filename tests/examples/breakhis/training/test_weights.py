import logging
import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
from breakhis.training.weights import Loaded, check_start, load_exactly, read_weights, record_loads
from safetensors.torch import save_file
from torch import nn

from tests.support.pickles import CreatesAFile


@pytest.mark.parametrize("layout", ["plain", "state_dict", "model", "model_ema", "safetensors"])
def test_weights_are_read_in_each_layout(layout, tmp_path):
    weights = {"a.weight": torch.randn(2, 3), "a.count": torch.tensor(3)}
    path = tmp_path / f"file.{layout}"
    if layout == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights if layout == "plain" else {layout: weights, "epoch": 3}, path)
    torch.testing.assert_close(dict(read_weights(path)), weights, rtol=0, atol=0)


def broken_files() -> dict[str, object]:
    """Return contents of files that are no checkpoints: bytes, or an object to pickle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates such tensors; files of them remain
        quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    return {
        "empty.pth": b"",
        "empty.safetensors": b"",
        "junk.pth": b"junk" * 100,
        "junk.safetensors": b"\xff" * 100,
        "text.pth": "text",
        "list.pth": [torch.ones(2)],
        "number.pth": 3,
        "tensor.pth": torch.ones(2),
        "nothing.pth": {},
        "no_weights.pth": {"state_dict": {}},
        "not_a_dict.pth": {"state_dict": [1]},
        "none.pth": {"model": None},
        "value.pth": {"a": torch.ones(1), "b": 3},
        "nested.pth": {"net": {"a": torch.ones(1)}},
        "key.pth": {3: torch.ones(1)},
        "code.pth": {"a": CreatesAFile()},
        "complex.pth": {"a": torch.ones(2, dtype=torch.complex64)},
        "sparse.pth": {"a": torch.eye(2).to_sparse()},
        "quantised.pth": {"a": quantised},
        "meta.pth": {"a": torch.ones(3, device="meta")},
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_file_that_is_no_checkpoint_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, path = broken_files()[name], tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=rf"{name} must be a checkpoint .*, got \S") as refused:
        read_weights(path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_checkpoint_cut_off_anywhere_is_refused(suffix, tmp_path):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    weights = {"a": torch.randn(300), "b": torch.randn(20, 7)}
    save_file(weights, whole) if suffix == "safetensors" else torch.save(weights, whole)
    content = whole.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"cut.{suffix} must be a checkpoint"):
            read_weights(path)


def test_a_missing_file_is_an_error_of_the_file_system(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        read_weights(tmp_path / "none.pth")


def test_a_model_is_loaded_with_exactly_its_weights(tmp_path):
    source, model = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2))
    weights = source.state_dict()
    load_exactly(model, weights, tmp_path)
    torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=0)
    for changes, problem in (
        ({"0.bias": None}, "0.bias is missing"),
        ({"1.num_batches_tracked": None}, "1.num_batches_tracked is missing"),  # torch alone would fill it in
        ({"1.bias": None, "2.bias": torch.ones(3)}, "1.bias is missing, 2.bias is left over"),
        ({"0.weight": torch.ones(3, 5)}, r"0.weight must be of shape \(3, 2\), got \(3, 5\)"),
        ({"0.bias": torch.ones(3, dtype=torch.int64)}, "0.bias must be of torch.float32, got torch.int64"),
        (
            {"1.num_batches_tracked": torch.tensor(3.0)},
            "1.num_batches_tracked must be of torch.int64, got torch.float32",
        ),
        (dict.fromkeys("abcde", torch.ones(1)), "a is left over, b is left over, c is left over, and 2 more$"),
    ):
        wrong = {key: value for key, value in (weights | changes).items() if value is not None}
        with pytest.raises(ValueError, match=rf"w.pth must hold the weights .* exactly: {problem}"):
            load_exactly(model, wrong, tmp_path / "w.pth")


def start_from(path, name: str, num_classes: int, **arguments) -> nn.Module:
    """Make a model from a file, as a run does."""
    with record_loads() as loads:
        model = timm.create_model(
            name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay={"file": str(path)}, **arguments
        )
    check_start(model, loads, path)
    return model


DISTILLED = "deit_tiny_distilled_patch16_224"  # two classifiers, and positions of a fixed size


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", DISTILLED])
def test_any_model_starts_from_a_file_with_a_new_classifier(name, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source, path = timm.create_model(name, num_classes=5), tmp_path / "donor.pth"
    torch.save(source.state_dict(), path)
    model = start_from(path, name, num_classes=2)
    names = model.pretrained_cfg["classifier"]
    heads = tuple(f"{head}." for head in ((names,) if isinstance(names, str) else names))
    state, donor = ({key: v for key, v in m.state_dict().items() if not key.startswith(heads)} for m in (model, source))
    torch.testing.assert_close(state, donor, rtol=0, atol=0)
    (message,) = [
        message for message in caplog.messages if message.startswith(f"not loaded from {path}, so these start")
    ]
    assert set(re.findall(r"\S+(?:weight|bias)", message)) == {k for k in model.state_dict() if k.startswith(heads)}


def changed(weights, **changes):
    return {key: value for key, value in (dict(weights) | changes).items() if value is not None}


@pytest.mark.parametrize("num_classes", [2, 1000])  # another classifier than timm's own weights have, or the same
def test_a_file_that_does_not_fill_the_backbone_is_refused(num_classes, tmp_path):
    weights, path = timm.create_model("test_resnet", num_classes=num_classes).state_dict(), tmp_path / "donor.pth"
    for wrong in (
        {"a": torch.zeros(3)},
        {"fc.weight": torch.ones(5, 7)},
        changed(weights, **{"layer1.0.conv1.weight": None}),
        changed(weights, **{"layer1.0.bn1.running_var": None}),
        changed(weights, extra=torch.ones(1)),
        changed(weights, **{"layer1.0.conv1.weight": torch.ones(3)}),
        {f"encoder.{key}": value for key, value in weights.items()},
        {key: value.int() for key, value in weights.items()},
    ):
        torch.save(wrong, path)
        with pytest.raises((ValueError, RuntimeError)):  # a RuntimeError where timm is strict itself
            start_from(path, "test_resnet", num_classes)
    for dtype in (torch.float32, torch.bfloat16):
        torch.save(
            {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}, path
        )
        start_from(path, "test_resnet", num_classes)


def test_a_self_supervised_file_has_no_head_at_all(tmp_path):
    weights, path = timm.create_model("test_convnext").state_dict(), tmp_path / "donor.pth"
    torch.save({key: value for key, value in weights.items() if not key.startswith("head.")}, path)
    start_from(path, "test_convnext", 2)
    # But a part of a head is a mistake.
    torch.save(changed(weights, **{"head.norm.weight": None}), path)
    with pytest.raises(ValueError, match=r"except the classifier: head.\S+ is left over"):
        start_from(path, "test_convnext", 2)


def test_a_missing_part_of_a_head_is_refused():
    model = timm.create_model("test_convnext", num_classes=2)
    classifier, norm = ["head.fc.weight", "head.fc.bias"], ["head.norm.weight", "head.norm.bias"]
    for missing in ([], classifier, [*classifier, *norm]):
        check_start(model, [Loaded(model, missing, [], [])], Path("w.pth"))
    for missing in ([*classifier, norm[0]], norm, ["stem.0.bias"]):
        with pytest.raises(ValueError, match=r"^w.pth must hold weights .*: (head.norm|stem.0)\.\w+ is missing"):
            check_start(model, [Loaded(model, missing, [], [])], Path("w.pth"))


def test_a_load_that_was_not_seen_is_refused():
    """Else another way of loading, in a later version of timm, would not be checked."""
    model, another = nn.Linear(1, 1), nn.Linear(1, 1)
    for loads in ([], [Loaded(another, [], [], [])], 2 * [Loaded(model, [], [], [])]):
        with pytest.raises(ValueError, match=r"^w.pth must be loaded once by timm, got [02] times$"):
            check_start(model, loads, Path("w.pth"))


def test_buffers_that_timm_computes_may_be_in_the_file(tmp_path):
    model = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2, img_size=32)
    computed = dict(model.named_buffers()).keys() - model.state_dict().keys()
    assert "blocks.0.attn.relative_position_index" in computed
    buffers = {name: model.get_buffer(name) for name in computed}
    torch.save(model.state_dict() | buffers, tmp_path / "donor.pth")
    small = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32}
    start_from(tmp_path / "donor.pth", "beit_base_patch16_224", 2, **small)


def test_timms_conversions_count(tmp_path):
    """A file with the names of torchvision's DenseNet, which timm converts."""
    source = timm.create_model("densenet121", growth_rate=4, block_config=(1, 1), num_classes=7)
    names = {key: key.replace("conv1.", "conv.1.").replace("norm1.", "norm.1.") for key in source.state_dict()}
    converted = {names[key]: value for key, value in source.state_dict().items()}
    assert converted.keys() != source.state_dict().keys()
    torch.save(converted, tmp_path / "donor.pth")
    model = start_from(tmp_path / "donor.pth", "densenet121", 2, growth_rate=4, block_config=(1, 1))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval().forward_features(images), source.eval().forward_features(images))


def test_recording_ends_with_the_block():
    original = nn.Module.load_state_dict
    with record_loads() as loads:
        assert nn.Module.load_state_dict is not original
        with pytest.raises(RuntimeError, match="Missing key"):
            nn.Linear(1, 1).load_state_dict({})
    assert nn.Module.load_state_dict is original
    assert loads == []
