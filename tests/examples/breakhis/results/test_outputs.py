import os
import re
from pathlib import Path, PurePosixPath

import pytest
from breakhis.files import write_csv
from breakhis.results.outputs import check_not_inputs, check_outside, check_table, overlay_paths
from hypothesis import given
from hypothesis import strategies as st

COLUMNS = ("file", "patient")


def test_an_earlier_table_is_replaced(tmp_path):
    check_table(tmp_path / "new.csv", COLUMNS)
    (tmp_path / "link.csv").symlink_to("nowhere")
    check_table(tmp_path / "link.csv", COLUMNS)
    write_csv(tmp_path / "old.csv", [{"file": "a", "patient": "", "prob_=x": 1}])
    check_table(tmp_path / "old.csv", COLUMNS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"file\na\n",
        b"patient,file\n",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xfe",
        b"file;patient\n",
        b"x" * 300_000,
        b'"file',
    ],
)
def test_any_other_file_is_not_replaced(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    (tmp_path / "link.csv").symlink_to(path)
    os.link(path, tmp_path / "hard.csv")
    for name in ("table.csv", "link.csv", "hard.csv"):
        with pytest.raises(
            ValueError, match=rf"must not replace a file that is no earlier .*, got '{tmp_path / name}'"
        ):
            check_table(tmp_path / name, COLUMNS)


def test_special_files_are_not_replaced_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    (tmp_path / "folder.csv").mkdir()
    for name in ("pipe.csv", "device.csv", "folder.csv"):
        with pytest.raises(ValueError, match="must not replace a file that is no earlier table"):
            check_table(tmp_path / name, COLUMNS)


def test_a_name_that_is_too_long_is_found_now(tmp_path):
    with pytest.raises(OSError, match="File name too long"):
        check_table(tmp_path / ("x" * 256), COLUMNS)


def test_inputs_are_known_by_all_their_names(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_text("a")
    (tmp_path / "soft").symlink_to("in/a.png")
    (tmp_path / "twice").symlink_to("soft")
    os.link(tmp_path / "in/a.png", tmp_path / "hard")
    (tmp_path / "folder").symlink_to("in")
    (tmp_path / "copy").write_text("a")
    inputs = [tmp_path / "in/a.png", tmp_path / "gone.png"]
    for output in ("in/a.png", "soft", "twice", "hard", "folder/a.png", "in/../in/a.png"):
        with pytest.raises(
            ValueError, match=rf"must not replace an input, got '{tmp_path}/{output}', which is the file"
        ):
            check_not_inputs([tmp_path / "copy", tmp_path / output], inputs)
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(ValueError, match=r"got 'a.png', which is the file '.*in/a.png'"):
        check_not_inputs([Path("a.png")], inputs)
    check_not_inputs([tmp_path / "copy", tmp_path / "new", tmp_path / "gone.png"], inputs)


def test_results_lie_outside(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("in/deep")
    for folder in ("in", "in/new/cams", "link/cams", "in/deep/../x"):
        with pytest.raises(ValueError, match=rf"must not lie in '{tmp_path}/in', .*, got '{tmp_path}/{folder}'"):
            check_outside(tmp_path / folder, [tmp_path / "elsewhere", tmp_path / "in"])
    check_outside(tmp_path / "in2", [tmp_path / "in"])
    check_outside(tmp_path, [tmp_path / "in"])


def overlays(*names: str) -> list[str]:
    return [path.relative_to("cams").as_posix() for path in overlay_paths(names, Path("cams"))]


def test_an_overlay_has_the_name_of_its_image_and_the_suffix_png():
    names = ["a.png", "b.jpg", "deep/a.tif", "c.d.jpeg", os.fsdecode(b"f\xe4.png")]
    assert overlays(*names) == ["a.png", "b.png", "deep/a.png", "c.d.png", os.fsdecode(b"f\xe4.png")]


def test_images_that_differ_in_the_suffix_keep_it_in_the_name():
    names = ["a.jpg", "a.png", "b.png", "deep/A.tif", "deep/a.png"]
    first, second, third, *deep = overlays(*names)
    assert [first, second, third] == ["a-jpg.png", "a-png.png", "b.png"]
    assert deep == ["deep/A-tif.png", "deep/a-png.png"]  # alike on macOS and Windows


@pytest.mark.parametrize(
    "names",
    [
        ("x" * 251 + ".png", "x" * 251 + ".jpg"),  # with its suffix, the name is too long
        ("ä" * 125 + ".png", "ä" * 125 + ".jpg"),
        ("a.jpg", "a.png/b.png"),  # a file and a folder
        ("a.png", "A.png"),  # one file on macOS and Windows
        ("\u00e4.png", "a\u0308.png"),  # on macOS
        ("deep/a.png", "DEEP/a.png"),
    ],
)
def test_names_that_collide_or_are_too_long_get_a_hash(names):
    for order in (names, names[::-1]):
        results = overlays(*order)
        assert len({result.casefold() for result in results}) == 2
        assert any(re.search(r"-[0-9a-f]{10}\.png$", result) for result in results)
        assert [PurePosixPath(result).parent for result in results] == [PurePosixPath(name).parent for name in order]
        assert all(result.endswith(".png") and len(os.fsencode(Path(result).name)) <= 255 for result in results)
    assert sorted(overlays(*names)) == sorted(overlays(*names))


PARTS = st.one_of(
    st.sampled_from(["a", "A", "a.png", "a.png.png", "b" * 255, "\u00e4" * 127, "\u00e4"]),
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=3),
).filter(lambda part: part not in (".", ".."))


@given(st.sets(st.lists(PARTS, min_size=1, max_size=3).map("/".join), min_size=1, max_size=6))
def test_overlays_never_meet(names):
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    results = overlays(*sorted(names - folders))  # a file is no folder
    assert len(set(results)) == len(results)
    assert not set(results) & {str(parent) for result in results for parent in PurePosixPath(result).parents}
    assert all(len(os.fsencode(part)) <= 255 for result in results for part in result.split("/"))
