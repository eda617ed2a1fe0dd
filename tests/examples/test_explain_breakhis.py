import json
import os
import shutil
from pathlib import Path

import explain_breakhis
import numpy as np
import pytest
import timm
import torch
import train_breakhis
from breakhis.files import read_csv, write_csv
from breakhis.results.explain import as_picture, grad_cam, overlay
from breakhis.training.checkpoints import hash_checkpoint, save_model
from explain_breakhis import branch_names, find_runs, main
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from kfde_layers import MFDF
from tests.support.hub import needs_local_dir
from tests.support.runs import SMALL, SUBTYPES, load_input, load_with_timm, read_rows

pytestmark = [needs_local_dir, pytest.mark.slow]  # four models are trained first
DRAWINGS = {name: getattr(explain_breakhis, name) for name in ("draw_cam_panels", "draw_gates", "draw_branch_weights")}
DPI = 150


def run_script(out: Path, *more: str) -> tuple[int, dict[str, tuple]]:
    """Run the script; return its exit code, and the arguments that each file was drawn from."""
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in DRAWINGS.items():

            def keep(*args, function=function):
                drawn[args[-1].name] = args[:-1]
                function(*args)

            patch.setattr(explain_breakhis, name, keep)
        return main(["--runs", str(out), "--device", "cpu", *more]), drawn


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
    code, drawn = run_script(study)
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
    code, drawn = run_script(study, *flags)
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


def test_missing_images_are_an_error(study, tmp_path, caplog):
    code, drawn = run_script(study, "--output-dir", str(tmp_path / "figures"), "--data-dir", str(tmp_path))
    assert (code, drawn) == (2, {})
    assert f"error: path must be an image file, got '{tmp_path}/BreaKHis_v1/" in caplog.text
    code, drawn = run_script(study, "--output-dir", str(tmp_path / "figures"), "--data-dir", str(tmp_path / "nowhere"))
    assert (code, drawn) == (2, {})
    assert f"got {str(tmp_path / 'nowhere')!r}" in caplog.text


@pytest.fixture
def make_run(study, tmp_path):
    """Make a finished run from that of the baseline, with an untrained model of timm or none."""

    def make(model: str | None, variant: str, fold: int = 0, seed: int = 0, **arguments) -> Path:
        source = study / "runs/baseline-100X-fold0-seed0"
        folder = tmp_path / "out" / "runs" / f"{variant}-100X-fold{fold}-seed{seed}"
        folder.mkdir(parents=True)
        shutil.copy(source / "predictions.csv", folder)
        metrics = json.loads((source / "metrics.json").read_text())
        metrics |= {"variant": variant, "fold": fold, "seed": seed}
        if model is not None:
            config = {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "center"}
            torch.manual_seed(0)
            net = timm.create_model(model, num_classes=len(SUBTYPES), pretrained_cfg_overlay=config, **arguments)
            save_model(net, folder / "best", SUBTYPES, arguments)
            metrics["best_sha256"] = hash_checkpoint(folder / "best")
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return folder

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_metrics(run: Path, **changes: object) -> None:
    metrics = json.loads((run / "metrics.json").read_text()) | changes
    (run / "metrics.json").write_text(json.dumps(metrics))


def shift_weights(run: Path) -> None:
    """Put other weights of the same model in their place."""
    weights = load_file(run / "best/model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, run / "best/model.safetensors")


def double_input(run: Path) -> None:
    """Let the model, which takes any size, see larger images than the run."""
    config = json.loads((run / "best/config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 128, 128]
    (run / "best/config.json").write_text(json.dumps(config))


@pytest.fixture
def nothing_computed(monkeypatch):
    """Fail if a model is loaded."""
    monkeypatch.setattr(explain_breakhis, "load_model", lambda folder: pytest.fail("loaded a model"))


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "metrics.json").write_text("{"), "metrics.json must be a mapping in JSON"),
        (lambda run: (run / "metrics.json").write_text("{}"), "metrics.json must be written by train_breakhis.py"),
        (lambda run: (run / "metrics.json").write_bytes(b"\xff"), "metrics.json must be a mapping in JSON"),
        (lambda run: (run / "predictions.csv").write_text("file\na.png\n"), "predictions.csv must have a value for"),
        (lambda run: (run / "predictions.csv").unlink(), " must be the folder of a finished run, with predictions.csv"),
        (lambda run: shutil.rmtree(run / "best"), "best/config.json' must be a file of a finished run, got none"),
        (lambda run: (run / "best/model.safetensors").unlink(), "best/model.safetensors' must be a file of a finished"),
        (lambda run: (run / "results.json").write_text("[1]"), "results.json must be a mapping in JSON"),
        (shift_weights, "/best must be the checkpoint that its run wrote, got another model.safetensors"),
        (double_input, "/best must be the checkpoint that its run wrote, got another config.json"),
        (
            lambda run: change_metrics(run, best_sha256={"config.json": "ab" * 32}),
            "best_sha256 must have 64 hexadecimal digits for each of config.json and model.safetensors of ",
        ),
        (lambda run: change_metrics(run, best_sha256="ab" * 32), "metrics.json must have best_sha256 of type dict"),
        (
            lambda run: (run / "explain").mkdir() or (run / "explain/decisions.csv").write_text("a,b\n"),
            "decisions.csv'",
        ),
    ],
)
def test_what_is_wrong_with_a_run_is_named_before_a_model_is_loaded(make_run, caplog, damage, message):
    run = make_run("resnet10t", "resnet")
    damage(run)
    before = contents(run)
    assert run_script(run) == (2, {})
    (line,) = caplog.messages
    assert line.startswith("error: ")
    assert message in line
    assert line.isprintable()
    assert contents(run) == before


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("link", [lambda target, path: os.link(target, path), os.symlink], ids=["hard", "soft"])
@pytest.mark.parametrize("name", ["cam-100X.png", "gates-KFDE-100X.png", "branches-KFDE-100X.png"])
@pytest.mark.parametrize("target", ["image", "best/model.safetensors", "metrics.json"])
def test_no_input_is_replaced_by_a_figure(make_run, synthetic_tree, caplog, link, name, target):
    run = make_run("resnet10t", "resnet")
    (run / "explain").mkdir()
    image = synthetic_tree / read_rows(run / "predictions.csv")[-1]["file"]
    link(image if target == "image" else run / target, run / "explain" / name)
    before = contents(run)
    assert run_script(run) == (2, {})
    assert f"error: must not replace an input, got '{run}/explain/{name}', which is the file '" in caplog.text
    assert contents(run) == before


def test_names_of_a_run_stay_in_the_folder_and_off_the_terminal(make_run, caplog):
    run = make_run("resnet10t", "resnet")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics |= {"variant": "../\x1b[31m$x^{$" + "x" * 300, "magnification": "../../40X\n"}
    (run / "metrics.json").write_text(json.dumps(metrics))
    rows = read_csv(run / "predictions.csv")
    write_csv(run / "predictions.csv", [row | {"patient": os.fsdecode(b"f\xe4\n")} for row in rows])
    before = set(contents(run.parents[2]))
    code, drawn = run_script(run)
    assert code == 0
    (name,) = written_files(run)
    assert drawn[name][0][0].label.endswith(r"patient f\udce4\n")
    assert name.startswith("cam-.._.._40X_-")
    assert set(contents(run.parents[2])) - before == {f"out/runs/{run.name}/explain/{name}"}
    assert all(message.isprintable() for message in caplog.messages)
    assert any(r"\x1b[31m$x" in message for message in caplog.messages)


def test_a_model_with_other_classes_than_its_run_is_refused(make_run, caplog):
    run = make_run("resnet10t", "resnet")
    config = json.loads((run / "best/config.json").read_text())
    config["label_names"] = config["label_names"][::-1]
    (run / "best/config.json").write_text(json.dumps(config))
    change_metrics(run, best_sha256=hash_checkpoint(run / "best"))
    assert run_script(run) == (2, {})
    assert f"error: {run}/best must have the classes of its run, ['A', 'F'," in caplog.text


def written_files(out: Path) -> set[str]:
    return {path.name for path in (out / "explain").iterdir()}


def test_the_images_are_chosen_by_name_and_not_by_row(make_run, drawn):
    run = make_run("resnet10t", "resnet")
    header, *rows = (run / "predictions.csv").read_text().splitlines()
    assert rows[::-1] != sorted(rows)
    (run / "predictions.csv").write_text("\n".join([header, *rows[::-1]]) + "\n")
    code, drawn_again = run_script(run)
    assert code == 0
    panels, expected = drawn_again["cam-100X.png"][0], drawn["cam-100X.png"][0]
    assert [panel.label for panel in panels] == [panel.label for panel in expected]
    assert [panel.picture.tobytes() for panel in panels] == [panel.picture.tobytes() for panel in expected]


def test_a_model_without_kfde_has_only_panels(make_run, caplog):
    out = make_run("resnet10t", "resnet").parents[1]
    code, _ = run_script(out)
    assert code == 0
    assert written_files(out) == {"cam-100X.png"}
    assert "resnet at 100X has no KFDE layer, so no gates and branches" in caplog.messages


def test_a_model_without_maps_is_left_out_of_the_panels(make_run, caplog):
    mixer = {"img_size": 64}
    make_run("mixer_s32_224", "a-mixer", **mixer)
    out = make_run("resnet10t", "resnet").parents[1]
    code, drawn = run_script(out)
    assert code == 0
    assert list(drawn["cam-100X.png"][0][0].overlays) == ["resnet"]
    assert any(
        message.startswith("a-mixer is left out of cam-100X.png: model must have") for message in caplog.messages
    )
    shutil.rmtree(out / "explain")
    shutil.rmtree(out / "runs/resnet-100X-fold0-seed0")
    assert run_script(out) == (2, {})
    assert f"--runs must have a model with a feature map or KFDE layers, got none in {out}" in caplog.text


def test_a_single_run_and_several_stages(make_run, tmp_path):
    run = make_run(
        "kfde_convnextv2_atto", "KFDE", kfde_stages=[2, 3], mfdf={"kernel_sizes": [3, 3], "dilation": [1, 2]}
    )
    code, drawn = run_script(run)
    assert code == 0
    stages = ("stages.2", "stages.3")
    expected = {f"gates-KFDE-100X-{stage}.kfde.csfe.cfe.png" for stage in stages}
    expected |= {f"branches-KFDE-100X-{stage}.kfde.mfdf.png" for stage in stages}
    assert written_files(run) == {"cam-100X.png", "decisions.csv", *expected}
    assert drawn["branches-KFDE-100X-stages.3.kfde.mfdf.png"][2] == ["3 x 3 px", "3 x 3 px, dilation 2 px"]
    assert {row["module"] for row in read_rows(run / "explain/decisions.csv")} == {
        f"{stage}.kfde.{name}" for stage in stages for name in ("csfe.cfe", "mfdf")
    }


def test_a_variant_with_other_test_images_is_left_out(make_run, caplog):
    make_run("resnet10t", "baseline")
    run = make_run("kfde_convnextv2_atto", "KFDE")
    header, _, *rest = (run / "predictions.csv").read_text().splitlines()
    (run / "predictions.csv").write_text("\n".join([header, *rest]) + "\n")
    code, drawn = run_script(run.parents[1])
    assert code == 0
    assert list(drawn["cam-100X.png"][0][0].overlays) == ["baseline"]
    assert "KFDE is left out of cam-100X.png: it tests other images" in caplog.messages
    assert f"on {len(rest)} of {len(rest)} test images" in drawn["gates-KFDE-100X.png"][-1]


def test_the_first_fold_and_seed_represent_a_variant(make_run):
    for fold, seed in ((10, 0), (2, 1), (2, 0)):
        make_run("resnet10t" if (fold, seed) == (2, 0) else None, "resnet", fold, seed)
    out = make_run("resnet10t", "baseline", 2, 0).parents[1]
    order = [(run["variant"], run["fold"], run["seed"]) for run in find_runs(out, None)]
    assert order == [("baseline", 2, 0), ("resnet", 2, 0), ("resnet", 2, 1), ("resnet", 10, 0)]
    code, drawn = run_script(out)  # it would fail on the runs without a model
    assert code == 0
    assert list(drawn["cam-100X.png"][0][0].overlays) == ["baseline", "resnet"]


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


@pytest.mark.parametrize("unfinished", [True, False])
def test_no_finished_run_is_an_error(tmp_path, caplog, unfinished):
    out = tmp_path / "out"
    if unfinished:
        (out / "runs/KFDE-100X-fold0-seed0").mkdir(parents=True)
        (out / "runs/KFDE-100X-fold0-seed0/config.yaml").write_text("epochs: 1\n")
    assert run_script(out) == (2, {})
    message = "--runs must be a directory with a finished run, which has metrics.json, got"
    assert f"{message} {str(out)!r}" in caplog.text
    assert not (out / "explain").exists()


def test_branches_have_different_names():
    layer = MFDF(8, kernel_sizes=(1, 3, 3), dilation=(1, 1, 2))
    assert branch_names(layer) == ["1 x 1 px", "3 x 3 px", "3 x 3 px, dilation 2 px"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(
            ([flag, str(value)], f"argument {flag}: must be from 1 to 1000000, got {value}")
            for flag in ("--images-per-class", "--max-gate-images")
            for value in (0, -3, 10**6 + 1, 10**30)
        ),
        (["--device", "abacus"], "argument --device: must be 'auto' or a device of this machine, got 'abacus'"),
    ],
)
def test_wrong_arguments_are_named_with_their_values(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        main(["--runs", str(tmp_path), *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
