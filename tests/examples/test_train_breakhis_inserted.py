"""Blocks inserted by a flag, in the scripts that train, predict, explain and publish; studies in shards."""

import json

import huggingface_hub
import pytest
import torch
from breakhis.training.checkpoints import load_model
from predict_breakhis import main as predict
from push_to_hub import main as push
from train_breakhis import main as train

from kfde_layers import CSFE, MFDF
from kfde_layers.layers import Blend
from tests.support.explained import explain
from tests.support.pages import python_blocks, run_block
from tests.support.predictions import QUIET
from tests.support.runs import ROOT, SMALL, read_rows
from tests.support.trained import assert_consistent

pytestmark = pytest.mark.slow  # every test trains a model
README = ROOT / "examples/README.md"
MODEL = ["--model", "test_efficientnet", "--insert", "{blocks.2: se, blocks.3: [csfe, {mfdf: {kernel_sizes: [3]}}]}"]


@pytest.fixture(scope="module")
def run(synthetic_tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("inserted")
    train(["--data-dir", str(synthetic_tree), "--output-dir", str(out), *SMALL, *MODEL, "--identity-start"])
    return out


def test_a_run_with_blocks_is_whole(run, synthetic_tree, leak_checker):
    metrics = assert_consistent(run, synthetic_tree, leak_checker)
    assert metrics["flags"]["insert"]["blocks.2"] == "se"
    config = json.loads((run / "best/config.json").read_text())
    assert config["inserted"] == {"blocks": metrics["flags"]["insert"], "identity_start": True}
    block = load_model(run / "best").blocks[3].kfde
    assert isinstance(block, Blend)
    assert [type(part) for part in block.block] == [CSFE, MFDF]


def test_other_scripts_take_a_run_with_blocks(run, synthetic_tree, tmp_path, caplog, monkeypatch):
    table, card = tmp_path / "predictions.csv", tmp_path / "card"
    command = ["--checkpoint", str(run / "best"), "--images", str(synthetic_tree), "--output", str(table)]
    assert predict([*command, *QUIET]) == 0
    known = sum(row["split"] != "test" for row in read_rows(run / "split.csv"))
    assert f"WARNING: {known} images are of cases that the model was trained on" in caplog.text
    of_run = {row["file"]: float(row["prob_benign"]) for row in read_rows(run / "predictions.csv")}
    predicted = {row["file"]: float(row["prob_benign"]) for row in read_rows(table)}
    assert {file: predicted[file] for file in of_run} == pytest.approx(of_run, abs=1e-5)
    code, drawn = explain(run)
    assert code == 0
    assert {name.partition("-")[0] for name in drawn} == {"cam", "gates", "branches"}
    assert push(["--run", str(run), "--repo-id", "you/name", "--output-dir", str(card)]) == 0
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id: card)
    row = read_rows(run / "predictions.csv")[0]
    names = {"file": synthetic_tree / row["file"]}
    run_block(python_blocks(card / "README.md")[0], card, names)
    assert names["probabilities"][0].item() == pytest.approx(float(row["prob_benign"]), abs=1e-5)


def test_the_function_of_the_readme_rebuilds_models_with_and_without_blocks(run, synthetic_tree, tmp_path):
    plain = tmp_path / "plain"
    train(["--data-dir", str(synthetic_tree), "--output-dir", str(plain), *SMALL, "--model", "test_efficientnet"])
    names: dict = {}
    run_block(python_blocks(README)[0], README, names)
    x = torch.randn(1, 3, 64, 64)
    for folder in (run / "best", plain / "best"):
        assert torch.equal(names["load"](folder)(x), load_model(folder)(x))


def test_an_ablation_of_another_model_in_shards(synthetic_tree, tmp_path, capsys):
    flags = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *SMALL, "--ablation", *MODEL[:2]]
    train([*flags, "--shard", "2/2"])
    assert "2 of 4 runs are finished; the shard that ends last writes the tables" in capsys.readouterr().out
    assert not (tmp_path / "results.md").exists()
    train([*flags, "--shard", "1/2"])
    printed = capsys.readouterr().out
    assert "All folds together" in printed
    assert f"python examples/explain_breakhis.py --runs {tmp_path}" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert [cell["variant"] for cell in results["cells"]] == ["baseline", "CSFE", "MFDF", "KFDE"]
    inserted = {
        folder.name.partition("-")[0]: json.loads((folder / "best/config.json").read_text()).get("inserted")
        for folder in (tmp_path / "runs").iterdir()
    }
    assert inserted["baseline"] is None
    assert inserted["KFDE"]["blocks"] == {"blocks.4": ["csfe", "mfdf"]}


def test_shards_with_other_flags_make_no_table(synthetic_tree, tmp_path):
    flags = ["--data-dir", str(synthetic_tree), "--output-dir", str(tmp_path), *SMALL, *MODEL[:2]]
    flags += ["--variants", "{a: {}, b: {smoothing: 0.1}}"]
    train([*flags, "--shard", "1/2"])
    with pytest.raises(SystemExit, match=r"a-100X-fold0-seed0 must be of the same study, but lr was 0.0001, now 0.02"):
        train([*flags, "--shard", "2/2", "--lr", "0.02"])
    assert not (tmp_path / "results.md").exists()
    with pytest.raises(SystemExit, match=r"--shard must divide the 2 runs of the study, got 3 shards"):
        train([*flags, "--shard", "1/3", "--resume"])


def test_a_block_that_does_not_fit_is_refused_before_any_run(synthetic_tree, tmp_path):
    variants = "{good: {}, bad: {insert: {blocks.9: se}}}"
    with pytest.raises(SystemExit, match=r"--insert must fit model test_efficientnet, got {'blocks.9': 'se'}: "):
        train(
            [
                "--data-dir",
                str(synthetic_tree),
                "--output-dir",
                str(tmp_path),
                *SMALL,
                *MODEL[:2],
                "--variants",
                variants,
            ]
        )
    assert not (tmp_path / "runs").exists()
