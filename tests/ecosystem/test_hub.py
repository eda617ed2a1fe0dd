"""Models pushed to the Hub load again, and so do weights in safetensors."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_model
from timm.models import push_to_hf_hub, save_for_hf

from kfde_layers import insert
from kfde_layers.testing import scatter_parameters
from tests.support.hub import hub_in_folder
from tests.support.inputs import images
from tests.support.pages import DOCS, python_blocks, run_block
from tests.support.training import INSERTED, MODELS, SMALL, WITH_BATCH_NORM, batch, build

pytestmark = pytest.mark.slow

PAGE = DOCS / "hub.md"
REPO_ID = "me/model"
SIDE = 64  # px


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub_in_folder(tmp_path, monkeypatch)
    return tmp_path


OPTIONS = {
    "plain": {},
    "no MFDF": {"mfdf": False},
    "stages": {"kfde_stages": [1, 3], "identity_start": True},
    "options": {
        "csfe": {"arrangement": "cfe_sfe", "num_groups": 4},
        "mfdf": {"kernel_sizes": [3, 5], "norm_layer": "batchnorm2d"},
    },
}
SOURCES = [pytest.param("hf-hub:", id="hf-hub"), pytest.param("local-dir:", id="local-dir")]


def source_of(prefix, hub):
    return f"{prefix}{REPO_ID}" if prefix == "hf-hub:" else f"{prefix}{hub / REPO_ID}"


@pytest.mark.parametrize("prefix", SOURCES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.cell("Hub and files", "push_to_hf_hub layout", "models")
def test_a_pushed_model_comes_back(options, prefix, hub):
    model = scatter_parameters(timm.create_model("kfde_convnextv2_atto", num_classes=3, **options), 0.02).eval()
    labels = {"label_names": ["a", "b", "c"]}
    push_to_hf_hub(model, REPO_ID, model_config=labels, model_args=options, safe_serialization=True)
    assert {path.name for path in (hub / REPO_ID).iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((hub / REPO_ID / "config.json").read_text())
    assert config["architecture"] == "kfde_convnextv2_atto"
    assert options.items() <= config.get("model_args", {}).items()
    state = load_file(hub / REPO_ID / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert "library_name: timm" in (hub / REPO_ID / "README.md").read_text()

    again = timm.create_model(source_of(prefix, hub), pretrained=True).eval()
    assert torch.equal(again(images(SIDE)), model(images(SIDE)))
    assert again.pretrained_cfg["label_names"] == ["a", "b", "c"]
    assert [name for name, _ in again.named_modules()] == [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("prefix", SOURCES)
@pytest.mark.cell("Hub and files", "push_to_hf_hub layout", "models")
def test_a_pushed_model_takes_another_classifier(prefix, hub):
    model = scatter_parameters(timm.create_model("kfde_convnextv2_atto", num_classes=3, mfdf=False), 0.02).eval()
    push_to_hf_hub(model, REPO_ID, model_args={"mfdf": False}, safe_serialization=True)
    with_other_classes = timm.create_model(source_of(prefix, hub), pretrained=True, num_classes=5).eval()
    assert with_other_classes(images(SIDE)).shape == (2, 5)
    assert torch.equal(with_other_classes.forward_features(images(SIDE)), model.forward_features(images(SIDE)))


@pytest.mark.parametrize("prefix", SOURCES)
@pytest.mark.cell("Hub and files", "push_to_hf_hub layout", "models")
def test_a_pushed_model_that_lacks_keys_is_refused(prefix, hub):
    model = timm.create_model("kfde_convnextv2_atto", num_classes=3, mfdf=False)
    push_to_hf_hub(model, REPO_ID, model_args={"mfdf": True}, safe_serialization=True)  # promises an MFDF that it lacks
    with pytest.raises(RuntimeError, match=r"Missing keys: stages\.3\.kfde\.mfdf\.branches\.0\.bias"):
        timm.create_model(source_of(prefix, hub), pretrained=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.cell("Hub and files", "transformers' TimmWrapper", "models")
def test_transformers_loads_a_saved_model_whose_classes_are_counted_once(options, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = scatter_parameters(timm.create_model("kfde_convnextv2_atto", num_classes=3, **options), 0.02).eval()
    config = {"label_names": ["a", "b", "c"]}
    save_for_hf(model, str(tmp_path), model_config=config, model_args=options, safe_serialization=True)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["model_args"].pop("num_classes", None)
    path.write_text(json.dumps(saved))
    classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(classifier(images(SIDE)).logits, model(images(SIDE)))
    assert classifier.config.id2label == {0: "a", 1: "b", 2: "c"}
    backbone = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(backbone(images(SIDE)).last_hidden_state, model.forward_features(images(SIDE)))


BLOCKS = {
    "a name": {"stages.1": "CSFE"},
    "options": {"stages.0": "SFE", "stages.2": ["MFDF", {"kernel_sizes": [3, 5], "rd_channels": 8}]},
    "one after the other": {"stages.3": ["CSFE", {"arrangement": "cfe_sfe", "fusion": "mean"}], "stages.1": "CFE"},
}


@pytest.mark.parametrize("identity_start", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.cell("Hub and files", "safetensors", "insert")
def test_a_file_says_what_was_inserted(blocks, identity_start, tmp_path):
    def make(blocks, identity_start):
        network = timm.create_model("test_convnext", num_classes=3)
        return insert(network, blocks, example_input=images(SIDE), identity_start=identity_start)

    network, path = scatter_parameters(make(blocks, identity_start), 0.05).eval(), tmp_path / "network.safetensors"
    metadata = {"blocks": json.dumps(blocks), "identity_start": json.dumps(identity_start)}
    save_model(network, path, metadata=metadata)
    with safe_open(path, "pt") as file:
        said = {key: json.loads(text) for key, text in file.metadata().items() if key in metadata}
    again = make(**said).eval()
    load_model(again, path)
    assert torch.equal(again(images(SIDE)), network(images(SIDE)))


@pytest.mark.cell("Hub and files", "push_to_hf_hub layout", "models")
def test_a_model_in_channels_last_is_pushed_after_it_is_made_contiguous(hub):
    model = timm.create_model("kfde_convnextv2_atto", num_classes=3).eval()
    expected = model(images(SIDE))
    model.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="trying to save a non contiguous tensor"):
        push_to_hf_hub(model, REPO_ID, safe_serialization=True)
    push_to_hf_hub(model.to(memory_format=torch.contiguous_format), REPO_ID, safe_serialization=True)
    again = timm.create_model(f"hf-hub:{REPO_ID}", pretrained=True).eval()
    torch.testing.assert_close(again(images(SIDE)), expected)


@pytest.mark.cell("Hub and files", "push_to_hf_hub layout", "models")
def test_the_model_that_the_page_pushes_loads_again(hub):
    names = run_block(python_blocks(PAGE)[0], PAGE)
    names["push"](REPO_ID)
    again = timm.create_model(f"hf-hub:{REPO_ID}", pretrained=True).eval()
    assert torch.equal(again(images(SIDE)), names["model"](images(SIDE)))
    assert again.pretrained_cfg["label_names"] == ["benign", "malignant"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", [*SMALL, *WITH_BATCH_NORM, *MODELS, *INSERTED])
@pytest.mark.cell("Hub and files", "safetensors")
def test_weights_in_safetensors_come_back_to_the_last_bit(name, memory_format, tmp_path):
    model = build(name, torch.float32)
    model(batch(name, torch.float32)[0])  # batch norms have statistics now
    model.eval()
    state = model.state_dict()
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)  # none is shared
    assert all(tensor.is_contiguous() for tensor in state.values())
    save_model(model.to(memory_format=memory_format), tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
    torch.manual_seed(1)
    again = scatter_parameters(build(name, torch.float32)).to(memory_format=memory_format).eval()
    load_model(again, tmp_path / "model.safetensors")
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    x = batch(name, torch.float32)[0].contiguous(memory_format=memory_format)
    assert torch.equal(again(x), model(x))
