"""Which files are images, and which of them cannot be used."""

import os
import re
import socket
import sys
from pathlib import Path

import pytest
from breakhis.data.images import IMAGE_SUFFIXES, find_faults, image_files, open_rgb
from PIL import Image

from tests.support.pictures import encode, noise


def test_find_faults_gives_reasons(tmp_path):
    good, small = tmp_path / "good.png", tmp_path / "small.png"
    noise().save(good)
    noise(31, 48).save(small)
    cut, empty, text, folder, missing = (tmp_path / f"{name}.png" for name in ("cut", "empty", "text", "dir", "none"))
    cut.write_bytes(encode(noise(), "PNG")[:2000])
    empty.touch()
    text.write_text("<html>Please log in</html>")
    folder.mkdir()
    (tmp_path / "exact.png").write_bytes(encode(noise(32, 32), "PNG"))
    faults = find_faults([text, good, small, cut, tmp_path / "exact.png", empty, folder, missing])
    assert list(faults.items()) == [
        (text, "it is not a BMP, JPEG, PNG or TIFF image"),
        (small, "the image is 48 x 31 px, smaller than 32 px in height or width"),
        (cut, faults[cut]),
        (empty, "it cannot be decoded: it has zero bytes"),
        (folder, "it cannot be opened: Is a directory"),
        (missing, "it cannot be opened: No such file or directory"),
    ]
    assert "truncated" in faults[cut]


@pytest.mark.parametrize("terminal", [True, False])
def test_find_faults_keeps_the_order_and_draws_a_bar_on_a_terminal(terminal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    paths = [tmp_path / f"{i}.png" for i in range(50)]
    for path in paths[::2]:
        noise().save(path)
    assert list(find_faults(paths)) == paths[1::2]
    assert ("50/50" in capsys.readouterr().err) == terminal
    assert find_faults([]) == {}


def test_image_files_are_sorted_and_hidden_files_left_out(tmp_path):
    names = ["b/x.PNG", "a.b/y.jpg", "a/z.TIFF", "a/deep/er/w.jpeg", "v.bmp", "u.tif", "a b.png"]
    hidden = [
        "._v.bmp",
        "a/._z.TIFF",
        "__MACOSX/v.bmp",
        "a/__MACOSX/._v.png",
        ".hidden/v.bmp",
        "notes.txt",
        "png",
        "x.gif",
    ]
    for name in names + hidden:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    paths = image_files(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == sorted(names)
    assert {path.suffix.lower() for path in paths} == IMAGE_SUFFIXES
    # Hidden folders above the directory do not matter.
    assert len(image_files(tmp_path / ".hidden")) == 1


def test_image_files_needs_a_directory(tmp_path):
    (tmp_path / "x.png").touch()
    for path in (tmp_path / "none", tmp_path / "x.png"):
        with pytest.raises(ValueError, match=rf"directory must be a directory, got '{re.escape(str(path))}'"):
            image_files(path)


def test_other_formats_are_refused_by_content(tmp_path):
    frames = [Image.new("L", (64, 64), colour) for colour in range(50)]
    frames[0].save(tmp_path / "x.png", "GIF", save_all=True, append_images=frames[1:])
    assert find_faults([tmp_path / "x.png"]) == {tmp_path / "x.png": "it is not a BMP, JPEG, PNG or TIFF image"}


def test_special_files_are_named_and_never_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to(tmp_path / "none")
    (tmp_path / "itself.png").symlink_to(tmp_path / "itself.png")
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        paths = image_files(tmp_path)
        monkeypatch.setattr(Path, "open", lambda *args: pytest.fail("opened"))
        assert {path.name: reason for path, reason in find_faults(paths).items()} == {
            "device.png": "it is a device, not a file",
            "gone.png": "it is a link to nothing",
            "itself.png": "it is a link to nothing",
            "pipe.png": "it is a pipe, not a file",
            "socket.png": "it is a socket, not a file",
        }
        with pytest.raises(ValueError, match=r"pipe\.png': it is a pipe, not a file"):
            open_rgb(tmp_path / "pipe.png")


@pytest.mark.parametrize("name", [b"f\xe4rbung.png", b"\x1b[2J\n.png", b"x" * 251 + b".png"])
def test_any_name_is_found_and_read(tmp_path, name):
    with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
        noise().save(file, "PNG")
    (path,) = image_files(tmp_path)
    assert os.fsencode(path.name) == name
    assert open_rgb(path).size == (48, 40)
    assert find_faults([path]) == {}
