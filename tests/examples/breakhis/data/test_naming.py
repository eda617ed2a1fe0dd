import logging
import os
from pathlib import Path

import pytest
from breakhis.data.naming import find_breakhis, full_names, parse_name
from breakhis.data.records import patients
from breakhis.data.sources import BREAKHIS
from PIL import Image


def write_image(path: Path) -> None:
    """Write a small image, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (7, 5)).save(path)


@pytest.mark.parametrize(
    ("name", "subtype", "patient_id", "case_id", "magnification", "diagnosis"),
    [
        ("SOB_B_A-14-22549AB-40-001.png", "A", "14-22549AB", "14-22549", "40X", "benign"),
        ("SOB_B_PT-14-22704-100-003.png", "PT", "14-22704", "14-22704", "100X", "benign"),
        ("SOB_M_DC-14-13412-200-010.JPG", "DC", "14-13412", "14-13412", "200X", "malignant"),
        ("SOB_M_PC-15-190EF-400-034.tif", "PC", "15-190EF", "15-190", "400X", "malignant"),
    ],
)
def test_a_name_says_everything(name, subtype, patient_id, case_id, magnification, diagnosis):
    record = parse_name(Path("anywhere") / name)
    assert record.labels == {"subtype": subtype, "binary": diagnosis}
    assert (record.patient_id, record.case_id, record.magnification) == (patient_id, case_id, magnification)
    assert [record.group(by) for by in ("patient", "case", "image")] == [patient_id, case_id, f"anywhere/{name}"]


def test_the_slide_filed_under_two_types_is_one_patient():
    ductal = parse_name(Path("SOB_M_DC-14-13412-100-001.png"))
    lobular = parse_name(Path("SOB_M_LC-14-13412-100-001.png"))
    assert ductal.patient_id == lobular.patient_id
    assert ductal.labels["subtype"] != lobular.labels["subtype"]


@pytest.mark.parametrize(
    "name",
    [
        "SOB_M_A-14-22549AB-40-001.png",  # adenosis is not malignant
        "SOB_B_DC-14-2523-40-001.png",  # ductal carcinoma is not benign
        "SOB_B_A-14-22549AB-50-001.png",  # no such magnification
        "SOB_B_A-14-22549AB-40-001.txt",
        "SOB_B_A-22549AB-40-001.png",  # no year
        "slide.png",
    ],
)
def test_a_wrong_name_is_refused_and_named(name):
    with pytest.raises(ValueError, match=r"path must be named SOB_.*, got '" + name):
        parse_name(Path(name))


@pytest.mark.parametrize("tree", ["BreaKHis_v1/deep/SOB/{}", "400X/benign/{}", "train/malignant/{}", "{}"])
def test_images_are_found_in_any_tree_and_sorted_by_name(tmp_path, tree):
    for name in ("SOB_M_DC-14-2-100-002.png", "SOB_B_A-14-1-40-001.png", "SOB_M_DC-14-2-100-001.jpg"):
        write_image(tmp_path / tree.format(name))
    names = [record.path.name for record in find_breakhis(tmp_path).records]
    assert names == ["SOB_B_A-14-1-40-001.png", "SOB_M_DC-14-2-100-001.jpg", "SOB_M_DC-14-2-100-002.png"]


def test_misnamed_files_and_copies_are_left_out(tmp_path, caplog):
    for folder in ("fold1/test", "fold1/train", "fold2/test"):
        write_image(tmp_path / folder / "SOB_B_A-14-1-40-001.png")
    write_image(tmp_path / "figure.png")
    with caplog.at_level(logging.WARNING, logger="breakhis"):
        records, misnamed = find_breakhis(tmp_path)
    assert [record.path.parent.relative_to(tmp_path).as_posix() for record in records] == ["fold1/test"]
    (message,) = caplog.messages
    assert message.startswith("left out 2 further copies of images, such as")
    assert list(misnamed) == [tmp_path / "figure.png"]
    assert misnamed[tmp_path / "figure.png"].endswith("got 'figure.png'")


def test_images_behind_links_are_found_once(tmp_path, caplog):
    data = tmp_path / "data"
    write_image(data / "SOB_B_A-14-1-40-001.png")
    write_image(tmp_path / "elsewhere/SOB_B_A-14-1-40-002.png")
    write_image(Path(os.fsdecode(os.fsencode(tmp_path) + b"/elsewhere/f\xe4/SOB_B_A-14-1-40-003.png")))
    for link in ("a", "b"):
        (data / link).symlink_to(tmp_path / "elsewhere")
    (data / "loop").symlink_to(data)
    (data / "SOB_B_A-14-1-40-004.png").symlink_to("SOB_B_A-14-1-40-001.png")
    records, _ = find_breakhis(data)
    assert [os.fsencode(record.path.relative_to(data)) for record in records] == [
        *(b"SOB_B_A-14-1-40-001.png", b"a/SOB_B_A-14-1-40-002.png", b"a/f\xe4/SOB_B_A-14-1-40-003.png")
    ]


def test_copies_are_named_without_control_characters(tmp_path, caplog):
    for folder in ("a", "b\x1b[31m"):
        write_image(tmp_path / folder / "SOB_B_A-14-1-40-001.png")
    find_breakhis(tmp_path)
    (message,) = caplog.messages
    assert message.endswith(r"/b\x1b[31m/SOB_B_A-14-1-40-001.png")


def test_a_slide_filed_under_two_types_is_reported(tmp_path, caplog):
    for kind in ("DC", "LC"):
        write_image(tmp_path / f"SOB_M_{kind}-14-13412-100-001.png")
    write_image(tmp_path / "SOB_M_DC-14-2-100-001.png")
    with caplog.at_level(logging.WARNING, logger="breakhis"):
        assert patients(find_breakhis(tmp_path).records) == {"14-13412", "14-2"}
    (message,) = caplog.messages
    assert message.startswith("WARNING: slide 14-13412 is filed under DC and LC: it counts as one patient")


def test_a_directory_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a directory"):
        find_breakhis(tmp_path / "absent")
    with pytest.raises(ValueError, match=rf"SOB_.*\.png at any depth, got none in '{tmp_path}'"):
        find_breakhis(tmp_path)


def test_classes_have_a_fixed_order():
    assert BREAKHIS.classes == {
        "binary": ("benign", "malignant"),
        "subtype": ("A", "F", "PT", "TA", "DC", "LC", "MC", "PC"),
    }


def test_abbreviations_are_explained_to_readers():
    assert full_names(BREAKHIS.classes["subtype"]) == [
        *("A adenosis", "F fibroadenoma", "PT phyllodes tumor", "TA tubular adenoma"),
        *("DC ductal carcinoma", "LC lobular carcinoma", "MC mucinous carcinoma", "PC papillary carcinoma"),
    ]
    assert full_names(["DC", "A"]) == ["DC ductal carcinoma", "A adenosis"]


def test_classes_of_other_data_sets_stay_as_they_are():
    assert full_names(["A", "B"]) == ["A", "B"]  # not adenosis
    assert full_names(["benign", "\x1b[2J"]) == ["benign", r"\x1b[2J"]
