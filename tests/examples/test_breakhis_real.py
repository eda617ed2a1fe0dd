"""True BreakHis files, where a checkout has them beside it; none of them is part of this repository."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from breakhis.checkpoints import build_model, eval_transform
from breakhis.data import BreakHisDataset, find_images, parse_name
from breakhis.splits import patient_split, patients
from train_breakhis import main

from tests.helpers import needs_local_dir

DATA = Path(os.environ.get("KFDE_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
pytestmark = [
    pytest.mark.skipif(
        not (DATA / "breakhis-originals").is_dir(),
        reason=f"no BreakHis images in {DATA}; KFDE_DATA names another place",
    ),
    needs_local_dir,
]


@pytest.mark.parametrize(("name", "count", "many"), [("breakhis-originals", 26, 21), ("breakhis-half", 471, 37)])
def test_every_name_parses(name, count, many):
    images = find_images(DATA / name, "all")
    assert len(images) == count
    assert len(list((DATA / name).rglob("*.png"))) == count
    assert len(patients(images)) == many
    assert len({image.subtype for image in images}) == 8


def test_every_name_of_the_whole_data_set_parses():
    lines = (DATA / "breakhis-folds" / "dsfold1.txt").read_text().split()
    images = [parse_name(Path(line.split("|")[0])) for line in lines]
    assert len(images) == 7909
    assert Counter(image.label("binary") for image in images) == {"benign": 2480, "malignant": 5429}
    assert len(patients(images)) == 81  # 82 slides, of which 14-13412 under DC and under LC is one


def test_an_image_of_another_size_loads():
    images = [i for i in find_images(DATA / "breakhis-originals", "100X") if i.patient_id == "14-12465"]
    model, _ = build_model("kfde_convnextv2_atto", num_classes=2, img_size=224, pretrained=False)
    image, target, index = BreakHisDataset(images, "binary", eval_transform(model))[0]
    assert (image.shape, target, index) == ((3, 224, 224), 1, 0)


def test_the_slide_filed_twice_is_one_group_in_the_real_tree(leak_checker):
    images = find_images(DATA / "breakhis-half", "100X")
    assert {i.subtype for i in images if i.patient_id == "14-13412"} == {"DC", "LC"}
    for fold in range(5):
        split = patient_split(images, "subtype", 5, fold, 0)
        assert leak_checker((i.patient_id, name) for name, part in split.parts().items() for i in part) == set()


@pytest.mark.parametrize(
    "arguments", [["--magnification", "100X"], ["--magnification", "400X", "--task", "subtype", "--protocol", "image"]]
)
def test_a_short_run_where_many_classes_are_absent(arguments, tmp_path):
    small = ["--img-size", "64", "--epochs", "1", "--num-workers", "0"]
    main(["--data-dir", str(DATA / "breakhis-originals"), "--output-dir", str(tmp_path), *small, *arguments])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["n_images"]["test"] > 0
    assert len(metrics["confusion_matrix"]) == len(metrics["classes"])
