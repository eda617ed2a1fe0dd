import itertools
import os
from pathlib import Path

import pytest
from breakhis.data.images import find_faults
from breakhis.data.search import search


def touch(*paths: Path) -> None:
    """Write empty files, and the folders above them."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(root: Path) -> list[str]:
    """Return the PNG files below a folder, relative to it."""
    return [path.relative_to(root).as_posix() for path in search(root, {".png"}).files]


def test_links_are_followed(tmp_path):
    root = tmp_path / "data"
    touch(root / "here/a.png", tmp_path / "elsewhere/deep/b.png", tmp_path / "c.png", tmp_path / "cut.png/d.txt")
    (root / "there").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "c.png").symlink_to(tmp_path / "c.png")
    (root / "folder.png").symlink_to(tmp_path / "cut.png")
    assert found(root) == ["c.png", "here/a.png", "there/deep/b.png"]
    assert search(root, {".png"}).folders[0] == root
    assert {path.name for path in search(root, {".png"}).folders} == {"data", "here", "there", "deep", "folder.png"}


def test_the_folder_itself_may_be_a_link(tmp_path):
    touch(tmp_path / "real/a.png")
    (tmp_path / "link").symlink_to("real")
    assert search(tmp_path / "link", {".png"}).files == [tmp_path / "link/a.png"]


def test_loops_end(tmp_path, caplog):
    root = tmp_path / "data"
    touch(root / "a/b/x.png", tmp_path / "y.png", tmp_path / "other/z.png")
    (root / "a/b/up").symlink_to("..")
    (root / "itself").symlink_to(".")
    (root / "out").symlink_to("..")
    (tmp_path / "other/back").symlink_to(root)
    (root / "same").symlink_to("same")  # no folder: a link to itself
    assert found(root) == ["a/b/x.png", "out/other/z.png", "out/y.png"]
    assert caplog.messages == [f"WARNING: left out {root}/same: it is a link to nothing"]


def test_two_folders_that_link_to_each_other(tmp_path):
    touch(tmp_path / "a/x.png", tmp_path / "b/y.png")
    (tmp_path / "a/b").symlink_to("../b")
    (tmp_path / "b/a").symlink_to("../a")
    assert found(tmp_path) == ["a/x.png", "b/y.png"]
    assert found(tmp_path / "a") == ["b/y.png", "x.png"]


@pytest.mark.parametrize("link", ["0-before", "z-after"])
def test_what_is_reached_twice_counts_once_by_its_own_name(tmp_path, caplog, link):
    touch(tmp_path / "m/x.png")
    (tmp_path / link).symlink_to("m")
    (tmp_path / f"{link}.png").symlink_to("m/x.png")
    assert found(tmp_path) == ["m/x.png"]
    assert caplog.messages == [f"left out 1 further names of files that links lead to, such as {tmp_path}/{link}.png"]


def test_a_hard_link_counts_once(tmp_path, caplog):
    touch(tmp_path / "b.png", tmp_path / "c.png")
    os.link(tmp_path / "b.png", tmp_path / "a.png")
    assert found(tmp_path) == ["a.png", "c.png"]
    assert "left out 1 further names" in caplog.text


def test_the_order_of_the_file_system_does_not_matter(tmp_path, monkeypatch):
    touch(tmp_path / "x/1.png", tmp_path / "y/2.png", tmp_path / "out/3.png")
    for name in ("k", "l"):
        (tmp_path / "x" / name).symlink_to(tmp_path / "out")
        (tmp_path / "y" / name).symlink_to(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out")
    for link in itertools.chain((tmp_path / "x").glob("?"), (tmp_path / "y").glob("?")):
        link.unlink()
        link.symlink_to(tmp_path / ".out")
    scandir, results = os.scandir, []

    class Sorted(list):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    for backwards in (False, True):

        def sorted_scan(folder, backwards=backwards):
            with scandir(folder) as scan:
                return Sorted(sorted(scan, key=lambda entry: entry.name, reverse=backwards))

        monkeypatch.setattr(os, "scandir", sorted_scan)
        results.append(found(tmp_path))
    assert results == [["x/1.png", "x/k/3.png", "y/2.png"]] * 2


def test_broken_links_are_named(tmp_path, caplog):
    (tmp_path / "folder\x1b").symlink_to("nowhere")
    (tmp_path / "image.png").symlink_to("nowhere")
    (tmp_path / "through").symlink_to("image.png/more")
    assert found(tmp_path) == ["image.png"]  # whoever opens it names it
    assert sorted(caplog.messages) == [
        f"WARNING: left out {tmp_path}/folder\\x1b: it is a link to nothing",
        f"WARNING: left out {tmp_path}/through: it is a link to nothing",
    ]


def test_a_link_that_may_not_be_followed_is_named(tmp_path, caplog, monkeypatch):
    touch(tmp_path / "secret/x.png", tmp_path / "data/a.png")
    (tmp_path / "data/link").symlink_to(tmp_path / "secret")
    (tmp_path / "data/link.png").symlink_to(tmp_path / "secret/x.png")
    system_stat = os.stat

    def refuse(path, **arguments):
        if Path(path).name.startswith("link") and arguments.get("follow_symlinks", True):
            raise PermissionError(13, "Permission denied")
        return system_stat(path, **arguments)

    monkeypatch.setattr(os, "stat", refuse)  # a test may run as root, who may follow every link
    monkeypatch.setattr(Path, "stat", lambda path, **arguments: refuse(path, **arguments))
    assert found(tmp_path / "data") == ["a.png", "link.png"]
    assert caplog.messages == [f"WARNING: left out {tmp_path}/data/link: it is a link that fails: Permission denied"]
    assert find_faults([tmp_path / "data/link.png"]) == {
        tmp_path / "data/link.png": "it is a link that fails: Permission denied"
    }


def test_a_folder_that_cannot_be_read_is_named(tmp_path, caplog, monkeypatch):
    touch(tmp_path / "a/x.png", tmp_path / "b/y.png")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "a":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)  # a test may run as root, who may read everything
    assert found(tmp_path) == ["b/y.png"]
    assert caplog.messages == [f"WARNING: left out the folder {tmp_path}/a: Permission denied"]


def test_files_without_numbers_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    touch(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("a.png")
    stat = Path.stat

    def without_number(path: Path, **arguments):
        status = list(stat(path, **arguments))
        return os.stat_result([status[0], 0, *status[2:]])

    monkeypatch.setattr(Path, "stat", without_number)
    assert found(tmp_path) == ["a.png", "b.png"]
