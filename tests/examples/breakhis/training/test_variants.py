"""What variants and ablations change in the flags of a run."""

import pytest
import timm
from breakhis.training import blocks
from breakhis.training.options import expand

from kfde_layers import insertion_points
from tests.support.flags import parse


def test_variants_add_to_the_models_arguments(tmp_path):
    args = parse(
        tmp_path,
        *("--model-kwargs", "{output_stride: 16, csfe: true}"),
        *("--variants", "{plain: {csfe: false}, dense: {mfdf: {groups: 1, kernel_sizes: [1, 3]}}, same: }"),
    )
    assert {run.variant: run.model_kwargs for run in expand(args)} == {
        "plain": {"output_stride": 16, "csfe": False},
        "dense": {"output_stride": 16, "csfe": True, "mfdf": {"groups": 1, "kernel_sizes": [1, 3]}},
        "same": {"output_stride": 16, "csfe": True},
    }


def test_variants_change_flags_of_the_model_and_the_recipe(tmp_path):
    args = parse(
        tmp_path,
        *("--model", "resnet18", "--lr", "0.5", "--insert", "{layer4: csfe}", "--model-kwargs", "{stem_width: 8}"),
        *(
            "--variants",
            "{a: {insert: {layer3: [se, {mfdf: {groups: 1}}]}, lr: 0.1, class_weights: true}, b: , c: {insert: {}}}",
        ),
    )
    runs = {run.variant: run for run in expand(args)}
    assert {name: run.insert for name, run in runs.items()} == {
        "a": {"layer3": ["se", {"mfdf": {"groups": 1}}]},
        "b": {"layer4": "csfe"},
        "c": {},
    }
    assert {name: (run.lr, run.class_weights) for name, run in runs.items()} == {
        "a": (0.1, True),
        "b": (0.5, False),
        "c": (0.5, False),
    }
    assert all(run.model_kwargs == {"stem_width": 8} for run in runs.values())


@pytest.mark.parametrize(
    ("model", "insert", "expected"),
    [
        (
            "resnet18",
            "{layer3: [csfe, {MFDF: {groups: 1}}], layer4: CSFE}",
            {
                "baseline": {},
                "CSFE": {"layer3": ["csfe"], "layer4": ["CSFE"]},
                "MFDF": {"layer3": [{"MFDF": {"groups": 1}}]},
                "KFDE": {"layer3": ["csfe", {"MFDF": {"groups": 1}}], "layer4": "CSFE"},
            },
        ),
        (
            "resnet18",
            "{layer3: [mfdf, {kernel_sizes: [3, 5]}], layer4: csfe}",
            {
                "baseline": {},
                "MFDF": {"layer3": [["mfdf", {"kernel_sizes": [3, 5]}]]},
                "CSFE": {"layer4": ["csfe"]},
                "MFDF+CSFE": {"layer3": ["mfdf", {"kernel_sizes": [3, 5]}], "layer4": "csfe"},
            },
        ),
        (
            "kfde_convnextv2_atto",
            "{stages.0: se, stages.1: eca}",
            {
                "baseline": {},
                "SE": {"stages.0": ["se"]},
                "ECA": {"stages.1": ["eca"]},
                "SE+ECA": {"stages.0": "se", "stages.1": "eca"},
            },
        ),
        (
            "test_resnet",
            "{}",
            {
                "baseline": {},
                "CSFE": {"layer4": ["csfe"]},
                "MFDF": {"layer4": ["mfdf"]},
                "KFDE": {"layer4": ["csfe", "mfdf"]},
            },
        ),
    ],
)
def test_an_ablation_leaves_out_blocks_of_any_model(model, insert, expected, tmp_path):
    runs = expand(parse(tmp_path, "--ablation", "--model", model, "--insert", insert))
    assert {run.variant: run.insert for run in runs} == expected


def test_an_ablation_leaves_out_points_without_an_effect(tmp_path, monkeypatch, capsys):
    """A vision transformer with a class token drops the map of its last block."""
    points = insertion_points(timm.create_model("test_vit"))
    runs = expand(parse(tmp_path, "--ablation", "--model", "test_vit"))
    assert runs[-1].insert == {list(points)[-2]: ["csfe", "mfdf"]}
    monkeypatch.setattr(blocks, "insertion_points", lambda model: {list(points)[-1]: None})
    with pytest.raises(SystemExit):
        parse(tmp_path, "--ablation", "--model", "test_vit")
    assert "argument --ablation: needs --insert for test_vit, which has no point at which" in capsys.readouterr().err
