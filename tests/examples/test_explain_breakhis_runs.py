"""Which runs, models and images are drawn; the models are not trained."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import explain_breakhis
import pytest
from breakhis.files import read_csv, write_csv
from explain_breakhis import branch_names, find_runs

from kfde_layers import MFDF
from tests.support.explained import explain, write_run, written_files
from tests.support.runs import SUBTYPES, contents, read_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def make_run(synthetic_tree, tmp_path) -> Callable[..., Path]:
    return partial(write_run, tmp_path / "out", synthetic_tree)


def test_names_of_a_run_stay_in_the_folder_and_off_the_terminal(make_run, caplog):
    run = make_run("resnet10t", "resnet")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics |= {"variant": "../\x1b[31m$x^{$" + "x" * 300, "magnification": "../../40X\n"}
    (run / "metrics.json").write_text(json.dumps(metrics))
    rows = read_csv(run / "predictions.csv")
    write_csv(run / "predictions.csv", [row | {"patient": os.fsdecode(b"f\xe4\n")} for row in rows])
    before = set(contents(run.parents[2]))
    code, drawn = explain(run)
    assert code == 0
    (name,) = written_files(run)
    assert drawn[name][0][0].label.endswith(r"patient f\udce4\n")
    assert name.startswith("cam-.._.._40X_-")
    assert set(contents(run.parents[2])) - before == {f"out/runs/{run.name}/explain/{name}"}
    assert all(message.isprintable() for message in caplog.messages)
    assert any(r"\x1b[31m$x" in message for message in caplog.messages)


def test_the_images_are_chosen_by_name_and_not_by_row(make_run):
    run = make_run("resnet10t", "resnet")
    _, drawn = explain(run)
    header, *rows = (run / "predictions.csv").read_text().splitlines()
    assert len(rows) == 2 * len(SUBTYPES)
    (run / "predictions.csv").write_text("\n".join([header, *rows[::-1]]) + "\n")
    code, drawn_again = explain(run)
    assert code == 0
    panels, expected = drawn_again["cam-100X.png"][0], drawn["cam-100X.png"][0]
    assert [panel.label for panel in panels] == [panel.label for panel in expected]
    assert [panel.field.tobytes() for panel in panels] == [panel.field.tobytes() for panel in expected]


def test_large_fields_are_reduced_and_their_maps_stay_in_place(make_run, monkeypatch):
    run = make_run("resnet10t", "resnet")
    _, drawn = explain(run)
    monkeypatch.setattr(explain_breakhis, "FIELD_PX", 70)
    code, drawn_again = explain(run)
    assert code == 0
    for before, after in zip(drawn["cam-100X.png"][0], drawn_again["cam-100X.png"][0], strict=True):
        assert (before.field.size, after.field.size) == ((175, 115), (70, 46))
        assert after.panels["resnet"].map[1:] == before.panels["resnet"].map[1:]  # size of the field, and place in it


def test_a_model_without_kfde_has_only_panels(make_run, caplog):
    out = make_run("resnet10t", "resnet").parents[1]
    code, _ = explain(out)
    assert code == 0
    assert written_files(out) == {"cam-100X.png"}
    assert "resnet at 100X has no KFDE layer, so no gates and branches" in caplog.messages


def test_a_model_without_maps_is_left_out_of_the_panels(make_run, caplog):
    mixer = {"img_size": 64}
    make_run("mixer_s32_224", "a-mixer", **mixer)
    out = make_run("resnet10t", "resnet").parents[1]
    code, drawn = explain(out)
    assert code == 0
    assert list(drawn["cam-100X.png"][0][0].panels) == ["resnet"]
    assert any(
        message.startswith("a-mixer is left out of cam-100X.png: model must have") for message in caplog.messages
    )
    shutil.rmtree(out / "explain")
    shutil.rmtree(out / "runs/resnet-100X-fold0-seed0")
    assert explain(out) == (2, {})
    assert f"--runs must have a model with a feature map or KFDE layers, got none in {out}" in caplog.text


def test_a_single_run_and_several_stages(make_run, tmp_path):
    run = make_run(
        "kfde_convnextv2_atto", "KFDE", kfde_stages=[2, 3], mfdf={"kernel_sizes": [3, 3], "dilation": [1, 2]}
    )
    code, drawn = explain(run)
    assert code == 0
    stages = ("stages.2", "stages.3")
    expected = {f"gates-KFDE-100X-{stage}.kfde.csfe.cfe.png" for stage in stages}
    expected |= {f"branches-KFDE-100X-{stage}.kfde.mfdf.png" for stage in stages}
    assert written_files(run) == {"cam-100X.png", "decisions.csv", *expected}
    assert drawn["branches-KFDE-100X-stages.3.kfde.mfdf.png"][1] == ["3 x 3 px", "3 x 3 px, dilation 2 px"]
    assert {row["module"] for row in read_rows(run / "explain/decisions.csv")} == {
        f"{stage}.kfde.{name}" for stage in stages for name in ("csfe.cfe", "mfdf")
    }


def test_a_variant_with_other_test_images_is_left_out(make_run, caplog):
    make_run("resnet10t", "baseline")
    run = make_run("kfde_convnextv2_atto", "KFDE")
    header, _, *rest = (run / "predictions.csv").read_text().splitlines()
    (run / "predictions.csv").write_text("\n".join([header, *rest]) + "\n")
    code, drawn = explain(run.parents[1])
    assert code == 0
    assert list(drawn["cam-100X.png"][0][0].panels) == ["baseline"]
    assert "KFDE is left out of cam-100X.png: it tests other images" in caplog.messages
    assert f", {len(rest)} test images of 8 patients" in drawn["gates-KFDE-100X.png"][-1].subtitle


def test_the_first_fold_and_seed_represent_a_variant(make_run):
    for fold, seed in ((10, 0), (2, 1), (2, 0)):
        make_run("resnet10t" if (fold, seed) == (2, 0) else None, "resnet", fold, seed)
    out = make_run("resnet10t", "baseline", 2, 0).parents[1]
    order = [(run["variant"], run["fold"], run["seed"]) for run in find_runs(out, None)]
    assert order == [("baseline", 2, 0), ("resnet", 2, 0), ("resnet", 2, 1), ("resnet", 10, 0)]
    code, drawn = explain(out)  # it would fail on the runs without a model
    assert code == 0
    assert list(drawn["cam-100X.png"][0][0].panels) == ["baseline", "resnet"]


def test_variants_are_in_the_order_of_the_study(make_run):
    for variant in ("a", "b", "KFDE", "baseline"):
        out = make_run(None, variant).parents[1]
    assert [run["variant"] for run in find_runs(out, None)] == ["baseline", "KFDE", "a", "b"]
    cells = [{"variant": "b"}, {"variant": "KFDE"}, {"variant": "a"}]
    (out / "results.json").write_text(json.dumps({"cells": cells}))
    assert [run["variant"] for run in find_runs(out, None)] == ["b", "KFDE", "a", "baseline"]


def test_drawn_images_are_searched_next_to_the_runs(make_run, tmp_path):
    run = make_run(None, "KFDE")
    metrics = json.loads((run / "metrics.json").read_text()) | {"synthetic": True}
    metrics["flags"]["data_dir"] = None
    (run / "metrics.json").write_text(json.dumps(metrics))
    out = run.parents[1]
    with pytest.raises(ValueError, match=r"--data-dir must be a directory with .*, got '.*out/synthetic'"):
        find_runs(out, None)
    (out / "synthetic").mkdir()
    assert find_runs(out, None)[0]["data_dir"] == out / "synthetic"
    assert find_runs(out, tmp_path)[0]["data_dir"] == tmp_path


def test_branches_have_different_names():
    layer = MFDF(8, kernel_sizes=(1, 3, 3), dilation=(1, 1, 2))
    assert branch_names(layer) == ["1 x 1 px", "3 x 3 px", "3 x 3 px, dilation 2 px"]
