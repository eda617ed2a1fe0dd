"""The model of a real run, written to a folder, and pushed to a folder in the place of the Hub."""

import ast
import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from breakhis.training.checkpoints import load_model
from huggingface_hub import ModelCard
from push_to_hub import HUB_ERRORS, main, write_card
from train_breakhis import main as train

from tests.support.hub import hub_in_folder
from tests.support.pages import python_blocks, run_block
from tests.support.runs import SMALL, contents, read_rows

pytestmark = pytest.mark.slow  # a model is trained first
REPO_ID = "someone/kfde"
MODEL_FILES = ["config.json", "model.safetensors"]
FILES = {"README.md", *MODEL_FILES}


@pytest.fixture(scope="module")
def run(synthetic_tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    options = ["--model-kwargs", "{csfe: {fusion: mean}, kfde_stages: [2, 3]}"]
    train(["--data-dir", str(synthetic_tree), "--output-dir", str(out), *SMALL, *options])
    return out


@pytest.fixture(scope="module")
def metrics(run):
    return json.loads((run / "metrics.json").read_text())


@pytest.fixture(scope="module")
def written(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "new"
    assert main(["--run", str(run), "--repo-id", REPO_ID, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the place of the repository on the Hub, and the calls to the Hub."""
    calls = hub_in_folder(tmp_path, monkeypatch, "push_to_hub")
    return SimpleNamespace(folder=tmp_path / REPO_ID, calls=calls)


@pytest.mark.cell("Hub and files", "push_to_hf_hub layout", "models")
def test_the_written_folder_is_the_checkpoint_with_its_card(run, written):
    assert contents(written).keys() == FILES
    assert (written / "model.safetensors").read_bytes() == (run / "best/model.safetensors").read_bytes()
    config, trained = (json.loads((folder / "config.json").read_text()) for folder in (written, run / "best"))
    assert config["pretrained_cfg"].pop("label_names") == trained["label_names"]  # timm writes them twice now
    assert config == trained
    x = torch.randn(2, 3, 64, 64)
    loaded = timm.create_model(f"local-dir:{written}", pretrained=True).eval()
    assert torch.equal(loaded(x), load_model(run / "best")(x))


@pytest.mark.cell("Hub and files", "push_to_hf_hub layout", "models")
def test_the_pushed_files_are_the_written_ones(run, written, hub):
    for private in (["--private"], []):  # the second time a card exists
        assert main(["--run", str(run), "--repo-id", REPO_ID, *private]) == 0
        assert contents(hub.folder) == contents(written)
        (hub.folder / "README.md").write_text("of an earlier run")
    files = sorted(FILES)
    assert hub.calls == [("create", True), ("folder", files), ("create", False), ("folder", files)]


@pytest.mark.cell("Hub and files", "transformers' TimmWrapper", "models")
def test_transformers_loads_the_best_model(run, written):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    x = torch.randn(2, 3, 64, 64)
    for folder in (run / "best", run / "last", written):
        model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        assert torch.equal(model(x).logits, load_model(folder)(x))
        assert list(model.config.id2label.values()) == ["benign", "malignant"]


@pytest.mark.cell("Hub and files", "model card", "models")
def test_the_hub_can_read_the_card(written):
    data = ModelCard((written / "README.md").read_text()).data
    assert data.library_name == "timm"
    assert data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0"
    assert {"timm", "kfde-layers", "image-classification"} <= set(data.tags)


def cells(card: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", card, re.M)]


@pytest.mark.cell("Hub and files", "model card", "models")
def test_the_card_gives_the_scores_of_the_run_and_its_protocol(written, metrics):
    card = (written / "README.md").read_text()
    assert "Protocol: case protocol, fold 0 of 3, breakhis 100X, binary." in card
    images, patients = metrics["n_images"]["test"], metrics["n_patients"]["test"]
    assert f"From {images} test images of {patients} patients:" in card
    rows = {row[0]: row[1:] for row in cells(card)}
    for part, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        numbers = [str(metrics[count][part]) for count in ("n_images", "n_patients")]
        assert rows[name] == [*numbers, ", ".join(metrics["absent_classes"][part]) or "none"]
    for name, key in (
        ("image accuracy", "image_accuracy"),
        ("patient recognition rate", "patient_recognition_rate"),
        ("balanced accuracy", "balanced_accuracy"),
        ("macro F1", "macro_f1"),
        ("area under the ROC curve", "auc"),
        ("expected calibration error", "ece"),
    ):
        assert float(rows[name][0]) == pytest.approx(metrics[key], abs=6e-4)
    assert rows["classes"] == ["benign, malignant"]
    assert rows["input"] == ["RGB, 64 x 64 px"]
    assert rows["started from"] == ["random weights"]
    assert rows["licence"] == ["apache-2.0"]
    assert "from epoch 1 of 1, chosen on validation, seed 0" in card
    assert "Not a medical device" in card


@pytest.mark.cell("Hub and files", "model card", "models")
def test_the_card_shows_how_to_load_the_model(run, hub, synthetic_tree, capsys):
    main(["--run", str(run), "--repo-id", REPO_ID])
    card = hub.folder / "README.md"
    (block,) = python_blocks(card)
    row = read_rows(run / "predictions.csv")[0]
    capsys.readouterr()
    run_block(block, card, {"file": synthetic_tree / row["file"]})
    printed = ast.literal_eval(capsys.readouterr().out)
    assert printed == pytest.approx({name: float(row[f"prob_{name}"]) for name in ("benign", "malignant")}, abs=1e-5)


@pytest.mark.cell("Hub and files", "model card", "models")
def test_the_licence_is_that_of_the_weights_it_started_from(synthetic_tree, tmp_path):
    torch.save(timm.create_model("convnextv2_atto").state_dict(), tmp_path / "imagenet.pth")
    arguments = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path / "out"), *SMALL]
    train([*arguments, "--checkpoint-path", str(tmp_path / "imagenet.pth")])
    main(["--run", str(tmp_path / "out"), "--repo-id", REPO_ID, "--output-dir", str(tmp_path / "card")])
    card = (tmp_path / "card/README.md").read_text()
    assert ModelCard(card).data.license == "cc-by-nc-4.0"
    rows = {row[0]: row[1:] for row in cells(card)}
    assert rows["licence"] == ["cc-by-nc-4.0: not for commercial use, like the weights that training started from"]
    digest = hashlib.sha256((tmp_path / "imagenet.pth").read_bytes()).hexdigest()
    assert rows["started from"] == [f"a checkpoint with SHA-256 {digest}"]


def test_names_in_the_card_are_no_markup(run, metrics):
    image = "<img src=x>|"
    changes = {"classes": [image], "absent_classes": {part: [image] for part in metrics["absent_classes"]}}
    card = write_card(REPO_ID, load_model(run / "best"), metrics | changes | {"fold_in_words": image})
    assert "<img" not in card
    assert card.count("&lt;img src=x&gt;&#124;") == 1 + 3 + 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"synthetic": True}, "The images are drawn: the scores show that the program works"),
        ({"synthetic": True}, "Images: drawn by a program, similar to BreakHis."),
        ({"protocol": "image"}, "Images of one patient are in both training and test, which inflates every score."),
        ({"scored_on": "val"}, "The scores are of the images that the checkpoint was chosen on"),
        ({"n_shared": 5}, "5 of the 16 test images are of cases that training or validation has too, which inflates"),
        ({"model": "bhcnet_3"}, "import breakhis.baselines  # of the folder examples/ of kfde-layers"),
        ({"scored_on": "val"}, "validation images of "),
        ({"n_images": {"train": 9, "val": 0, "test": 9}}, "chosen on no criterion: it is the last one"),
        ({"auc": None}, "| area under the ROC curve | undefined |"),
        ({"dataset": "idc"}, "Images: patches of invasive ductal carcinoma"),
        (
            {"flags": {"pretrained": True, "checkpoint_path": None, "insert": {}}},
            "| started from | the ImageNet weights that timm has",
        ),
    ],
)
@pytest.mark.cell("Hub and files", "model card", "models")
def test_the_card_names_the_limits_of_a_run(run, metrics, changes, sentence):
    model = load_model(run / "best")
    assert sentence in write_card(REPO_ID, model, metrics | changes)
    assert sentence not in write_card(REPO_ID, model, metrics)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"--run": "nowhere"},
            "argument --run: must be the folder of a finished run, with metrics.json, got 'nowhere'",
        ),
        ({"--repo-id": "kfde"}, "argument --repo-id: must be owner/name, got 'kfde'"),
        ({"--repo-id": "a/b/c"}, "argument --repo-id: must be owner/name, got 'a/b/c'"),
        ({"--run": "a\0b"}, "argument --run: must be a path, which has no NUL character"),
        ({"--output-dir": __file__}, "argument --output-dir: must be a directory, got the file"),
    ],
)
def test_wrong_arguments_are_named_with_their_values(run, changes, message, capsys):
    flags = {"--run": str(run), "--repo-id": REPO_ID, **changes}
    with pytest.raises(SystemExit) as stopped:
        main([part for pair in flags.items() for part in pair])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_folder_of_the_run_is_not_written_to(run, capsys):
    before = contents(run / "best")
    for folder in (run, run / "best", run / "best" / ".." / "last"):
        with pytest.raises(SystemExit):
            main(["--run", str(run), "--repo-id", REPO_ID, "--output-dir", str(folder)])
        assert f"argument --output-dir: must not lie in --run, got '{folder}'" in capsys.readouterr().err
    assert contents(run / "best") == before


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "copied")


def change_metrics(folder: Path, **changes) -> None:
    """Change entries of `metrics.json`; None removes one."""
    path = folder / "metrics.json"
    metrics = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(metrics))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "metrics.json").write_text("{"), "metrics.json must be a mapping in JSON, got text"),
        (lambda run: (run / "metrics.json").write_bytes(b"\xff"), "metrics.json must be a mapping in JSON, got text"),
        (lambda run: (run / "metrics.json").write_text("[]"), r"metrics.json must be a mapping in JSON, got \[\]"),
        (lambda run: change_metrics(run, best_sha256=None), "metrics.json must be written by .*, got no best_sha256"),
        (lambda run: change_metrics(run, classes=None), "metrics.json must be written by .*, got KeyError.'classes'"),
        (lambda run: change_metrics(run, n_images=3), "metrics.json must be written by .*, got TypeError"),
        *(
            (
                lambda run, hashes=hashes: change_metrics(run, best_sha256=hashes),
                "best_sha256 must have 64 hexadecimal digits for each of config.json and model.safetensors of .*best, "
                "got ",
            )
            for hashes in ({}, [], 7, "ab" * 32, {"config.json": "ab" * 32}, dict.fromkeys(MODEL_FILES, 3))
        ),
        # The scores of one run must not be published with the weights of another.
        (
            lambda run: flip(run / "best/model.safetensors"),
            "checkpoint that its run wrote, got another model.safetensors",
        ),
        (lambda run: flip(run / "best/config.json"), "checkpoint that its run wrote, got another config.json"),
    ],
)
def test_a_run_with_broken_or_foreign_files_is_not_published(copied, damage, message, tmp_path):
    damage(copied)
    with pytest.raises(SystemExit, match=f"^push_to_hub.py: error: .*{message}"):
        main(["--run", str(copied), "--repo-id", REPO_ID, "--output-dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_without_a_network_the_error_is_one_line(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        SystemExit, match=rf"^push_to_hub.py: error: --repo-id {REPO_ID} cannot be pushed: \S"
    ) as stopped:
        main(["--run", str(run), "--repo-id", REPO_ID])
    assert "\n" not in stopped.value.code


def test_a_refusal_of_the_hub_is_one_line(run, monkeypatch):
    class Api:
        def create_repo(self, *args, **kwargs):
            raise HUB_ERRORS[1]("403 Forbidden\nyou are not its owner")

    monkeypatch.setattr("push_to_hub.HfApi", Api)
    with pytest.raises(SystemExit, match=r"cannot be pushed: 403 Forbidden you are not its owner$"):
        main(["--run", str(run), "--repo-id", REPO_ID])
