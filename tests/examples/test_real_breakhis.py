"""Real files of BreakHis, which are not part of this repository; KFDE_DATA names their folder."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from breakhis.data.images import find_faults, open_rgb
from breakhis.data.naming import find_breakhis, parse_name
from breakhis.data.records import ImageDataset, patients
from breakhis.data.sources import BREAKHIS, IDC
from breakhis.data.splits import fold_split, leaks, official_split
from torchvision.transforms import PILToTensor
from train_breakhis import main

DATA = Path(os.environ.get("KFDE_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
pytestmark = [
    pytest.mark.skipif(
        not (DATA / "breakhis-originals").is_dir(),
        reason=f"no BreakHis images in {DATA}; KFDE_DATA can name another folder",
    ),
]


@pytest.mark.parametrize(
    ("name", "num_images", "num_patients"), [("breakhis-originals", 26, 21), ("breakhis-half", 471, 37)]
)
def test_every_name_parses_and_every_file_can_be_read(name, num_images, num_patients):
    records = find_breakhis(DATA / name).records
    assert len(records) == num_images
    assert len(list((DATA / name).rglob("*.png"))) == num_images
    assert len(patients(records)) == num_patients
    assert len({record.labels["subtype"] for record in records}) == 8
    assert find_faults([record.path for record in records]) == {}


def test_every_name_of_the_whole_data_set_parses():
    lines = (DATA / "breakhis-folds" / "dsfold1.txt").read_text().split()
    records = [parse_name(Path(line.split("|")[0])) for line in lines]
    assert len(records) == 7909
    assert Counter(record.labels["binary"] for record in records) == {"benign": 2480, "malignant": 5429}
    assert len(patients(records)) == 81  # of 82 slides; 14-13412, filed under DC and LC, is one patient
    assert len({record.case_id for record in records}) == 70


def test_an_image_of_another_size_loads():
    records = [r for r in find_breakhis(DATA / "breakhis-originals").records if r.patient_id == "14-12465"]
    assert open_rgb(records[0].path).size == (700, 456)
    data = ImageDataset(records, "binary", BREAKHIS.classes["binary"], PILToTensor())
    image, target, index = data[0]
    assert (image.shape, target, index) == ((3, 456, 700), 1, 0)


def test_the_slide_filed_twice_is_one_group_in_the_real_tree(leak_checker, caplog):
    records = find_breakhis(DATA / "breakhis-half").records
    assert "WARNING: slide 14-13412 is filed under DC and LC" in caplog.text
    assert {r.labels["subtype"] for r in records if r.patient_id == "14-13412"} == {"DC", "LC"}
    for fold in range(5):
        split = fold_split(records, "subtype", "patient", 5, fold, 0)
        assert leak_checker((r.patient_id, name) for name, part in split.parts().items() for r in part) == set()


def test_the_authors_lists_leak_the_slide_filed_twice_in_three_of_five_folds():
    lists = [DATA / "breakhis-folds" / f"dsfold{fold}.txt" for fold in range(1, 6)]
    records = [parse_name(Path(line.split("|")[0])) for line in lists[0].read_text().split()]
    leaking = [leaks(official_split(records, "subtype", "patient", path, seed=0), "patient") for path in lists]
    assert leaking == [["14-13412"], [], ["14-13412"], [], ["14-13412"]]


def test_patches_of_carcinoma_are_found_by_their_folders():
    records = IDC.find(DATA / "idc").records
    assert len(records) == 7863
    assert len(patients(records)) == 219
    assert all(f"class{r.path.parent.name}" in r.path.name for r in records)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["breakhis-originals", "--magnification", "100X"],
        ["breakhis-originals", "--magnification", "400X", "--task", "subtype", "--protocol", "image"],
        [
            "breakhis-half",
            "--protocol",
            "official",
            "--fold-dir",
            str(DATA / "breakhis-folds"),
            "--magnification",
            "40X",
        ],
    ],
)
def test_a_short_run_with_many_absent_classes(arguments, tmp_path):
    small = ["--img-size", "64", "--epochs", "1", "--num-workers", "0"]
    main(["--data-dir", str(DATA / arguments[0]), "--output-dir", str(tmp_path), *small, *arguments[1:]])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["n_images"]["test"] > 0
    assert len(metrics["confusion_matrix"]) == len(metrics["classes"])
