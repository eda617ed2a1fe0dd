"""The figures and the table of a study that was trained, against the equations and timm alone."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import train_breakhis
from breakhis import runner
from breakhis.data.naming import full_names
from breakhis.results.explain import grad_cam
from PIL import Image
from torch.nn import functional as F

from tests.support.explained import explain
from tests.support.runs import SMALL, SUBTYPES, load_input, load_with_timm, read_rows

pytestmark = pytest.mark.slow  # four models are trained first


@pytest.fixture(scope="module")
def study(synthetic_tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study")
    flags = [*SMALL, "--task", "subtype", "--ablation", "--lr", "1e-3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "draw_figures", lambda *args: None)
        train_breakhis.main(["--data-dir", str(synthetic_tree), "--output-dir", str(out), *flags])
    return out


@pytest.fixture(scope="module")
def drawn(study) -> dict[str, tuple]:
    code, drawn = explain(study)
    assert code == 0
    return drawn


def checkpoint(study: Path, variant: str) -> Path:
    return study / "runs" / f"{variant}-100X-fold0-seed0" / "best"


def scored_images(study: Path) -> list[dict[str, str]]:
    """Return the rows of the split's test images, each with the class in the file's name."""
    rows = read_rows(study / "runs/baseline-100X-fold0-seed0/split.csv")
    return [row | {"target": row["file"].split("SOB_")[-1][2:].split("-")[0]} for row in rows if row["split"] == "test"]


def first_images(study: Path) -> list[dict[str, str]]:
    """Return the row of the first test image of each class by file name."""
    rows = sorted(scored_images(study), key=lambda row: row["file"].rsplit("/")[-1])
    return [
        next(row for row in rows if row["target"] == name)
        for name in SUBTYPES
        if any(row["target"] == name for row in rows)
    ]


def test_the_figures_of_an_ablation(study, drawn):
    tested = scored_images(study)
    names = {"cam-100X.png", *(f"gates-{variant}-100X.png" for variant in ("CSFE", "KFDE"))}
    names |= {f"branches-{variant}-100X.png" for variant in ("MFDF", "KFDE")}
    assert set(drawn) == names
    assert {path.name for path in (study / "explain").iterdir()} == {*names, "decisions.csv"}
    patients = len({row["patient"] for row in tested})
    for name in names:
        with Image.open(study / "explain" / name) as picture:
            assert min(picture.size) > 400
        subtitle = drawn[name][-1].subtitle
        assert "case protocol, fold 0 of 3, breakhis 100X, subtype, seed 0" in subtitle
        if name != "cam-100X.png":
            assert subtitle.endswith(f", {len(tested)} test images of {patients} patients")
    assert drawn["gates-KFDE-100X.png"][-1].title == "Open gates of CFE by channel (KFDE, stages.3.kfde.csfe.cfe)"
    assert drawn["branches-MFDF-100X.png"][-1].title == "Branch weights of MFDF (MFDF, stages.3.kfde.mfdf)"


def test_the_panels_show_the_first_test_image_of_each_class(study, drawn, synthetic_tree):
    panels, heading = drawn["cam-100X.png"]
    expected_rows = first_images(study)
    assert len(expected_rows) >= 6
    count, patients = len(expected_rows), len({row["patient"] for row in expected_rows})
    assert heading.title == "Where the models look for the true class (Grad-CAM)"
    assert heading.subtitle == (
        "first image of each class by file name, case protocol, fold 0 of 3, breakhis 100X, subtype, seed 0, "
        f"{count} test images of {patients} patients, taken from {len(scored_images(study))}, "
        "map of 2 x 2 cells, frame: all that the network saw (66 % of the field), one scale for all maps"
    )
    names = dict(zip(SUBTYPES, full_names(SUBTYPES), strict=True))
    assert [panel.label for panel in panels] == [
        f"{names[row['target']]}\npatient {row['patient']}" for row in expected_rows
    ]
    for panel, row in zip(panels, expected_rows, strict=True):
        with Image.open(synthetic_tree / row["file"]) as field:
            assert panel.field.size == field.size  # the whole field
            np.testing.assert_array_equal(np.asarray(panel.field), np.asarray(field.convert("RGB")))


def test_the_panels_show_map_prediction_and_truth_of_each_model(study, drawn, synthetic_tree):
    panels, _ = drawn["cam-100X.png"]
    rows = first_images(study)
    assert all(list(panel.panels) == ["baseline", "CSFE", "MFDF", "KFDE"] for panel in panels)
    maps = {each.map.cells.tobytes() for panel in panels for each in panel.panels.values()}
    assert len(maps) > len(panels)  # otherwise swapped columns would not be noticed
    wrong = set()
    for variant in panels[0].panels:
        model, transform = load_with_timm(checkpoint(study, variant))
        for panel, row in zip(panels, rows, strict=True):
            inputs = load_input(transform, synthetic_tree / row["file"])
            shown, target = panel.panels[variant], SUBTYPES.index(row["target"])
            with torch.inference_mode():
                scores = model(inputs).softmax(1)[0].tolist()
            answer = scores.index(max(scores))
            verdict = "right" if answer == target else "WRONG"
            assert shown.answer == f"{verdict}: {SUBTYPES[answer]}, p = {scores[answer]:.2f}"
            assert shown.explained == f"map of {row['target']}, p = {scores[target]:.2f}"
            assert shown.wrong == (answer != target)
            wrong.add(shown.wrong)
            expected = grad_cam(model, inputs, [target])[0]
            assert shown.map.cells.shape == (2, 2)
            np.testing.assert_allclose(shown.map.cells, expected, atol=0.05 * expected.max())
            width, height = panel.field.size
            assert shown.map.size == panel.field.size == (175, 115)
            side = min(width, height)
            square = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
            assert shown.map.seen == pytest.approx(square, abs=side / 64)
    assert any(wrong)  # so that both words are seen


def test_the_table_holds_what_the_layers_decide(study, drawn, synthetic_tree):
    """Compute all rows of KFDE by the equations, from the input of its blocks."""
    model, transform = load_with_timm(checkpoint(study, "KFDE"))
    kfde, inputs = model.stages[3].kfde, {}
    for name in ("csfe", "mfdf"):
        kfde.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    gates, branches = {name: [] for name in SUBTYPES}, {name: [] for name in SUBTYPES}
    for row in scored_images(study):
        with torch.no_grad():
            model(load_input(transform, synthetic_tree / row["file"]))
            cfe, mfdf = kfde.csfe.cfe, kfde.mfdf
            normalized = F.group_norm(inputs["csfe"], cfe.num_groups, cfe.weight, cfe.bias, cfe.eps)
            is_open = normalized * (cfe.weight / cfe.weight.sum())[:, None, None] > 0
            gates[row["target"]].append(is_open.double().mean((2, 3))[0].numpy())
            maps = sum(branch(inputs["mfdf"]) for branch in mfdf.branches)
            alpha = mfdf.fc2(mfdf.fc1(maps.mean((2, 3)))).reshape(4, -1).softmax(0)
            branches[row["target"]].append(alpha.mean(1).numpy())

    written = [row for row in read_rows(study / "explain/decisions.csv") if row["variant"] == "KFDE"]
    assert list(written[0]) == [
        *("variant", "magnification", "fold", "seed", "module", "kind", "class", "channel_or_branch", "mean", "sd")
    ]
    assert {(row["magnification"], row["fold"], row["seed"]) for row in written} == {("100X", "0", "0")}
    names = {"gate": [str(c) for c in range(320)], "branch": [f"{size} x {size} px" for size in (1, 3, 5, 7)]}
    modules = {"gate": "stages.3.kfde.csfe.cfe", "branch": "stages.3.kfde.mfdf"}
    count = 0
    for kind, values in (("gate", gates), ("branch", branches)):
        for name in [name for name in SUBTYPES if values[name]]:
            rows = [row for row in written if (row["kind"], row["class"]) == (kind, name)]
            assert [row["channel_or_branch"] for row in rows] == names[kind]
            assert {row["module"] for row in rows} == {modules[kind]}
            stacked, count = np.array(values[name]), count + len(rows)
            for key, expected in (("mean", stacked.mean(0)), ("sd", stacked.std(0))):
                actual = np.array([float(row[key]) for row in rows])
                # A position may lie on the gate's threshold, and the map of a 64 px image has only four.
                close = np.abs(actual - expected) < 1e-5
                assert close.mean() > (0.98 if kind == "gate" else 0.999)
    assert len(written) == count  # no rows of absent classes

    means, labels, _ = drawn["gates-KFDE-100X.png"]
    tested = scored_images(study)
    for name, label in zip(full_names(SUBTYPES), labels, strict=True):
        images = [row for row in tested if row["target"] == name.split()[0]]
        cases = len({row["patient"] for row in images})
        count = f"n = {len(images)}, {cases} case{'s' * (cases != 1)}" if images else "no image"
        assert label == f"{name}: {count}"
    for name, row in zip(SUBTYPES, means, strict=True):
        rows = [r for r in written if (r["kind"], r["class"]) == ("gate", name)]
        assert row[np.isfinite(row)].tolist() == pytest.approx([float(r["mean"]) for r in rows])
    weights, parts, branch_labels, _ = drawn["branches-KFDE-100X.png"]
    assert parts == names["branch"]
    assert branch_labels == labels
    rows = [row for row in written if row["kind"] == "branch"]
    shown = weights.means[np.isfinite(weights.means)].tolist()
    assert shown == pytest.approx([float(row["mean"]) for row in rows])
    assert np.nanmax(np.abs(weights.means.sum(axis=1) - 1)) < 1e-5
    bounded = np.isfinite(weights.low)
    assert (weights.low <= weights.means)[bounded].all()
    assert (weights.means <= weights.high)[bounded].all()
    assert weights.unit == "case"


def test_flags_limit_the_images(study, tmp_path):
    flags = ["--output-dir", str(tmp_path / "figures"), "--images-per-class", "2", "--max-gate-images", "6"]
    code, drawn = explain(study, *flags)
    assert code == 0
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {*drawn, "decisions.csv"}
    panels, heading = drawn["cam-100X.png"]
    tested = [row["target"] for row in scored_images(study)]
    assert [panel.label.split(" ")[0] for panel in panels] == [
        name for name in SUBTYPES for _ in range(min(2, tested.count(name)))
    ]
    assert heading.subtitle.startswith("first 2 images of each class by file name, ")
    means, labels, heading = drawn["gates-KFDE-100X.png"]
    assert re.search(rf", 6 test images of [1-6] patients, taken from {len(tested)}$", heading.subtitle)
    for name, row, label in zip(SUBTYPES, means, labels, strict=True):
        count = tested.count(name)
        left_out = f"{count} image{'s' * (count != 1)}, none taken" if count else "no image"
        assert np.isfinite(row).all() or label.endswith(f": {left_out}")
    assert sum(label.endswith(", none taken") for label in labels) >= 1
    assert np.isfinite(means).all(axis=1).sum() >= 4  # of several classes: they are not the first six of the list
