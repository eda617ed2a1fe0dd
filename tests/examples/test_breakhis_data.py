import logging
from pathlib import Path

import pytest
import torch
from breakhis.data import CLASSES, BreakHisDataset, find_images, parse_name
from PIL import Image


def touch(path: Path, size: tuple[int, int] = (7, 5), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "subtype", "patient_id", "magnification", "sequence", "diagnosis"),
    [
        ("SOB_B_A-14-22549AB-40-001.png", "A", "14-22549AB", "40X", 1, "benign"),
        ("SOB_B_PT-14-22704-100-003.png", "PT", "14-22704", "100X", 3, "benign"),
        ("SOB_M_DC-14-13412-200-010.png", "DC", "14-13412", "200X", 10, "malignant"),
        ("SOB_M_PC-15-190EF-400-034.png", "PC", "15-190EF", "400X", 34, "malignant"),
    ],
)
def test_a_name_says_everything(name, subtype, patient_id, magnification, sequence, diagnosis):
    image = parse_name(Path("anywhere") / name)
    assert (image.subtype, image.patient_id, image.magnification, image.sequence) == (
        subtype,
        patient_id,
        magnification,
        sequence,
    )
    assert image.label("subtype") == subtype
    assert image.label("binary") == diagnosis


def test_the_slide_filed_under_two_types_is_one_patient():
    ductal = parse_name(Path("SOB_M_DC-14-13412-100-001.png"))
    lobular = parse_name(Path("SOB_M_LC-14-13412-100-001.png"))
    assert ductal.patient_id == lobular.patient_id
    assert ductal.subtype != lobular.subtype


@pytest.mark.parametrize(
    "name",
    [
        "SOB_M_A-14-22549AB-40-001.png",  # adenosis is not malignant
        "SOB_B_DC-14-2523-40-001.png",  # ductal carcinoma is not benign
        "SOB_B_A-14-22549AB-50-001.png",  # no such magnification
        "SOB_B_A-14-22549AB-40-001.jpg",
        "SOB_B_A-22549AB-40-001.png",  # no year
        "slide.png",
    ],
)
def test_another_name_is_refused_and_named(name):
    with pytest.raises(ValueError, match=r"path must be named SOB_.*, got '" + name):
        parse_name(Path(name))


def test_images_are_found_at_any_depth_in_the_order_of_their_names(tmp_path):
    touch(tmp_path / "z" / "SOB_B_A-14-1-40-001.png")
    touch(tmp_path / "a" / "b" / "SOB_M_DC-14-2-100-001.png")
    touch(tmp_path / "SOB_M_DC-14-2-100-002.png")
    names = [image.path.name for image in find_images(tmp_path, "all")]
    assert names == ["SOB_B_A-14-1-40-001.png", "SOB_M_DC-14-2-100-001.png", "SOB_M_DC-14-2-100-002.png"]
    assert [image.magnification for image in find_images(tmp_path, "40X")] == ["40X"]


def test_misnamed_files_and_second_copies_are_skipped_with_one_line_each(tmp_path, caplog):
    touch(tmp_path / "SOB_B_A-14-1-40-001.png")
    touch(tmp_path / "copy" / "SOB_B_A-14-1-40-001.png")
    touch(tmp_path / "figure.png")
    with caplog.at_level(logging.WARNING, logger="breakhis"):
        assert len(find_images(tmp_path, "40X")) == 1
    assert len(caplog.messages) == 2
    assert any("figure.png" in message for message in caplog.messages)
    assert any("second copy" in message for message in caplog.messages)


def test_nothing_found_names_the_directory_and_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match="data_dir must be a directory, got"):
        find_images(tmp_path / "absent", "all")
    with pytest.raises(ValueError, match=rf"SOB_.*\.png at any depth, got none in '{tmp_path}'"):
        find_images(tmp_path, "all")
    touch(tmp_path / "SOB_B_A-14-1-40-001.png")
    with pytest.raises(ValueError, match=r"magnification 400X has no image in .*, which holds 1 of 40X"):
        find_images(tmp_path, "400X")


def test_the_dataset_serves_rgb_targets_and_indices(tmp_path):
    touch(tmp_path / "SOB_B_TA-14-1-40-001.png", mode="RGBA")
    touch(tmp_path / "SOB_M_PC-14-2-40-001.png", mode="L")
    images = find_images(tmp_path, "40X")
    seen = []

    def transform(image):
        seen.append((image.mode, image.size))
        return torch.zeros(3, 2, 2)

    dataset = BreakHisDataset(images, "subtype", transform)
    assert len(dataset) == 2
    assert [dataset[i][1:] for i in range(2)] == [(3, 0), (7, 1)]
    assert seen == [("RGB", (7, 5))] * 2
    assert BreakHisDataset(images, "binary", transform).targets == [0, 1]
    assert CLASSES == {"binary": ("benign", "malignant"), "subtype": ("A", "F", "PT", "TA", "DC", "LC", "MC", "PC")}
