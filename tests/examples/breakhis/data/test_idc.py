import logging

import pytest
from breakhis.data.sources import IDC
from PIL import Image


def write_image(path):
    """Write a small image, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (7, 5)).save(path)


def test_patches_are_found_by_their_folders(tmp_path, caplog):
    write_image(tmp_path / "10253" / "1" / "b.png")
    write_image(tmp_path / "10253" / "0" / "a.png")
    write_image(tmp_path / "9" / "0" / "a.png")
    write_image(tmp_path / "9" / "2" / "a.png")
    write_image(tmp_path / "archive" / "10253" / "0" / "a.png")
    with caplog.at_level(logging.WARNING, logger="breakhis"):
        records, misnamed = IDC.find(tmp_path)
    assert caplog.messages == [f"left out 1 further copies of images, such as {tmp_path}/archive/10253/0/a.png"]
    assert [(record.patient_id, record.labels["binary"]) for record in records] == [
        ("10253", "other"),
        ("10253", "carcinoma"),
        ("9", "other"),
    ]
    assert [record.case_id for record in records] == ["10253", "10253", "9"]
    assert misnamed == {tmp_path / "9" / "2" / "a.png": "its folder must be named 0 or 1, got '2'"}


def test_patches_behind_links_are_found_once(tmp_path):
    write_image(tmp_path / "store" / "10253" / "1" / "b.png")
    for patient in ("10253", "again"):
        (tmp_path / "data" / patient).mkdir(parents=True)
    (tmp_path / "data" / "10253" / "1").symlink_to(tmp_path / "store" / "10253" / "1")
    (tmp_path / "data" / "again" / "1").symlink_to(tmp_path / "store" / "10253" / "1")
    (tmp_path / "data" / "loop").symlink_to("..")
    records, misnamed = IDC.find(tmp_path / "data")
    assert [(record.patient_id, record.path.name) for record in records] == [("10253", "b.png")]
    assert misnamed == {}


def test_a_directory_without_patches_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"<patient>/<0 or 1>/, got none in '{tmp_path}'"):
        IDC.find(tmp_path)


def test_classes_have_a_fixed_order():
    assert IDC.classes == {"binary": ("other", "carcinoma")}
