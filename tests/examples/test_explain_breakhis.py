"""The figures and the table of a study that was trained, against the equations and timm alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
import train_breakhis
from breakhis.results.explain import as_picture, grad_cam, overlay
from PIL import Image
from torch.nn import functional as F

from tests.support.explained import explain
from tests.support.runs import SMALL, SUBTYPES, load_input, load_with_timm, read_rows

pytestmark = pytest.mark.slow  # four models are trained first


DPI = 150


@pytest.fixture(scope="module")
def study(synthetic_tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study")
    flags = [*SMALL, "--task", "subtype", "--ablation", "--lr", "1e-3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_breakhis, "draw_figures", lambda *args: None)
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


def test_the_figures_of_an_ablation(study, drawn):
    present = {row["target"] for row in scored_images(study)}
    sizes = {"cam-100X.png": (0.5 + 2.2 * 5, 1 + 2.4 * len(present))}
    sizes |= {f"gates-{variant}-100X.png": (7.2, 4) for variant in ("CSFE", "KFDE")}
    sizes |= {f"branches-{variant}-100X.png": (7.2, 4) for variant in ("MFDF", "KFDE")}
    assert set(drawn) == set(sizes)
    assert {path.name for path in (study / "explain").iterdir()} == {*sizes, "decisions.csv"}
    for name, inches in sizes.items():
        with Image.open(study / "explain" / name) as picture:
            assert picture.size == pytest.approx([DPI * side for side in inches], abs=1)
        title = drawn[name][-1]
        assert "patient protocol, fold 0 of 3, breakhis 100X, subtype, seed 0" in title


def test_the_panels_show_the_first_test_image_of_each_class(study, drawn, synthetic_tree):
    panels, title = drawn["cam-100X.png"]
    assert "first test image of each class by file name" in title
    expected_rows = []
    for name in SUBTYPES:
        rows = [row for row in scored_images(study) if row["target"] == name]
        expected_rows += sorted(rows, key=lambda row: row["file"].rsplit("/")[-1])[:1]
    assert len(expected_rows) >= 6
    assert [panel.label for panel in panels] == [f"{row['target']}\npatient {row['patient']}" for row in expected_rows]
    assert all(list(panel.overlays) == ["baseline", "CSFE", "MFDF", "KFDE"] for panel in panels)
    pictures = {cell.picture.tobytes() for panel in panels for cell in panel.overlays.values()}
    assert len(pictures) > len(panels)  # otherwise swapped columns would not be noticed
    for variant in panels[0].overlays:
        model, transform = load_with_timm(checkpoint(study, variant))
        for panel, row in zip(panels, expected_rows, strict=True):
            inputs = load_input(transform, synthetic_tree / row["file"])
            picture, name, probability = panel.overlays[variant]
            target = SUBTYPES.index(row["target"])
            with torch.inference_mode():
                assert probability == pytest.approx(model(inputs).softmax(1)[0, target].item(), abs=1e-5)
            assert name == row["target"]
            shown = as_picture(model, inputs[0])
            np.testing.assert_array_equal(np.asarray(panel.picture), np.asarray(shown))
            expected = overlay(shown, grad_cam(model, inputs, [target])[0])
            assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected)).mean() < 0.5


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

    means, classes, _ = drawn["gates-KFDE-100X.png"]
    assert classes == SUBTYPES
    for name, row in zip(SUBTYPES, means, strict=True):
        rows = [r for r in written if (r["kind"], r["class"]) == ("gate", name)]
        assert row[np.isfinite(row)].tolist() == pytest.approx([float(r["mean"]) for r in rows])
    means, deviations, parts, _, _ = drawn["branches-KFDE-100X.png"]
    assert parts == names["branch"]
    assert np.nanmax(np.abs(means.sum(axis=1) - 1)) < 1e-5
    rows = [row for row in written if row["kind"] == "branch"]
    assert deviations[np.isfinite(deviations)].tolist() == pytest.approx([float(row["sd"]) for row in rows])


def test_flags_limit_the_images(study, tmp_path):
    flags = ["--output-dir", str(tmp_path / "figures"), "--images-per-class", "2", "--max-gate-images", "6"]
    code, drawn = explain(study, *flags)
    assert code == 0
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {*drawn, "decisions.csv"}
    panels, title = drawn["cam-100X.png"]
    tested = [row["target"] for row in scored_images(study)]
    assert [panel.label.split("\n")[0] for panel in panels] == [
        name for name in SUBTYPES for _ in range(min(2, tested.count(name)))
    ]
    assert "first 2 test images of each class" in title
    means, _, title = drawn["gates-KFDE-100X.png"]
    assert f"on 6 of {len(tested)} test images" in title
    assert np.isfinite(means).all(axis=1).sum() >= 4  # of several classes: they are not the first six of the list
