"""Images with any names and of any kind, and what is written."""

import os
import resource
import shutil
from pathlib import Path

import predict_breakhis
import pytest
from breakhis.files import read_csv, write_csv
from matplotlib.figure import Figure
from predict_breakhis import main

from tests.support.predictions import arguments
from tests.support.runs import read_rows


def test_bad_files_are_named_skipped_and_counted(checkpoint, images, tmp_path, caplog):
    good = (images / "SOB_B_A-14-1-100-001.png").read_bytes()
    (images / "cut.png").write_bytes(good[: len(good) // 2])
    (images / "deep" / "empty.png").write_bytes(b"")
    (images / "words.jpg").write_text("not an image")
    (images / "notes.txt").write_text("no suffix of an image")
    assert main(arguments(checkpoint, images, tmp_path / "out.csv")) == 0
    skipped = [message for message in caplog.messages if message.startswith("skipped ")]
    assert [line.split(":")[0] for line in skipped] == [
        "skipped cut.png",
        "skipped deep/empty.png",
        "skipped words.jpg",
    ]
    assert all(len(line.splitlines()) == 1 for line in skipped)
    assert "7 images, 3 skipped" in caplog.messages
    assert len(read_rows(tmp_path / "out.csv")) == 7


NAMES = [b"f\xe4rbung.png", b"\x1b[31mred\x07\n.png", b"=1+1.png", b"'a.png", b"x" * 251 + b".png"]


NAMES += ["größe.png".encode()]


def test_any_name_is_predicted_and_read_back(checkpoint, images, tmp_path, caplog):
    for name in NAMES:
        shutil.copy(images / "deep/field one.png", os.fsencode(images / "deep") + b"/" + name)
    with open(os.fsencode(images) + b"/\x1b[2J\xe4.png", "wb") as file:
        file.write(b"broken")
    cams = tmp_path / "cams"
    assert main(arguments(checkpoint, images, tmp_path / "out.csv", "--cam-dir", str(cams))) == 0
    rows = read_csv(tmp_path / "out.csv")
    assert {os.fsencode(row["file"]) for row in rows} >= {b"deep/" + name for name in NAMES}
    assert len(rows) == 7 + len(NAMES)
    overlays = [os.fsencode(path.relative_to(cams)) for path in cams.rglob("*.png")]
    assert len(overlays) == len(rows)
    assert b"deep/f\xe4rbung.png" in overlays
    assert r"skipped \x1b[2J\udce4.png: it is not a BMP, JPEG, PNG or TIFF image" in caplog.messages
    assert all(message.isprintable() for message in caplog.messages)


def test_formulas_are_text_in_the_table(checkpoint, images, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    shutil.copy(images / "deep/field one.png", folder / "=HYPERLINK(1).png")
    assert main(arguments(checkpoint, folder, tmp_path / "out.csv")) == 0
    assert [row["file"] for row in read_rows(tmp_path / "out.csv")] == ["'=HYPERLINK(1).png"]
    assert [row["file"] for row in read_csv(tmp_path / "out.csv")] == ["=HYPERLINK(1).png"]


def test_links_are_followed_and_special_files_skipped(checkpoint, images, tmp_path, caplog):
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "there").symlink_to(images / "deep")
    (folder / "again").symlink_to(images / "deep")
    (folder / "up").symlink_to(folder)
    (folder / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    assert main(arguments(checkpoint, folder, tmp_path / "out.csv")) == 0
    assert [row["file"] for row in read_rows(tmp_path / "out.csv")] == [
        *("again/SOB_B_A-14-1-400-003.jpg", "again/er/SOB_B_A-14-1-400-002.png"),
        *("again/field one.jpg", "again/field one.png"),
    ]
    assert "skipped gone.png: it is a link to nothing" in caplog.messages
    assert "skipped pipe.png: it is a pipe, not a file" in caplog.messages
    assert "4 images, 2 skipped" in caplog.messages


def test_an_earlier_table_is_replaced(checkpoint, images, tmp_path):
    output = images / "predictions.csv"
    for _ in range(2):
        assert main(arguments(checkpoint, images, output)) == 0
        assert len(read_rows(output)) == 7
    assert {path.name for path in images.glob("*.csv")} == {"predictions.csv", "predictions_patients.csv"}
    assert not list(images.rglob("*.part"))


def test_an_overlay_that_cannot_be_written_costs_no_predictions(checkpoint, images, tmp_path, caplog):
    cams = tmp_path / "cams"
    (cams / "SOB_M_DC-14-2-40-001.png/full").mkdir(parents=True)
    assert main(arguments(checkpoint, images, tmp_path / "out.csv", "--cam-dir", str(cams))) == 0
    assert len(read_rows(tmp_path / "out.csv")) == 7
    assert f"WARNING: no Grad-CAM in {cams}/SOB_M_DC-14-2-40-001.png: Is a directory" in caplog.messages
    assert len([path for path in cams.rglob("*") if path.is_file()]) == 6


def test_a_full_disk_costs_maps_and_no_predictions(checkpoint, images, tmp_path, monkeypatch, caplog):
    def write_half(figure, file: Path, **arguments) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", write_half)
    cams = tmp_path / "cams"
    assert main(arguments(checkpoint, images, tmp_path / "out.csv", "--cam-dir", str(cams))) == 0
    assert len(read_rows(tmp_path / "out.csv")) == 7
    assert sum("No space left on device" in message for message in caplog.messages) == 7
    assert not [path for path in cams.rglob("*") if path.is_file()]  # no half of a map either


def test_predictions_are_written_before_the_maps_are_drawn(checkpoint, images, tmp_path, monkeypatch):
    def stop(*args) -> None:
        assert len(read_rows(tmp_path / "out.csv")) == 7
        raise ValueError("stopped")

    monkeypatch.setattr(predict_breakhis, "draw_map", stop)
    with pytest.raises(SystemExit, match="stopped"):
        main(arguments(checkpoint, images, tmp_path / "out.csv", "--cam-dir", str(tmp_path / "cams")))
    assert len(read_rows(tmp_path / "out.csv")) == 7


def test_a_full_disk_leaves_nothing_behind(checkpoint, images, tmp_path, monkeypatch):
    """A limit on the size of a file stands for the disk: the system's error comes in the middle of the table."""

    def write_with_limit(path: Path, rows: list[dict[str, str]]) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # Python ignores the signal that this can send
        try:
            write_csv(path, rows)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(predict_breakhis, "write_csv", write_with_limit)
    with pytest.raises(SystemExit, match=r"^predict_breakhis.py: error: \[Errno 27\] File too large$"):
        main(arguments(checkpoint, images, tmp_path / "out" / "out.csv"))
    assert list((tmp_path / "out").iterdir()) == []
