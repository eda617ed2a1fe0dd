import io
import os
import re
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from breakhis.data.images import IMAGE_SUFFIXES, find_faults, image_files, open_rgb
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

ORANGE = (240, 120, 30)


def noise(height: int = 40, width: int = 48) -> Image.Image:
    """Make an image of noise, which compresses badly, so that a truncated file lacks pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(path: Path) -> tuple[int, int, int]:
    image = open_rgb(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 255), (0, 0, 0)),
        ("LA", (0, 51), (204, 204, 204)),  # a fifth of black on white
        ("RGB", ORANGE, ORANGE),
        ("RGBA", (*ORANGE, 255), ORANGE),
        ("RGBA", (*ORANGE, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_each_mode_becomes_rgb_with_transparency_on_white(tmp_path, mode, colour, expected, kind):
    Image.new(mode, (40, 40), colour).save(tmp_path / "x", kind)
    assert pixel(tmp_path / "x") == expected


@pytest.mark.parametrize(("mode", "colour"), [("1", 1), ("L", 77), ("RGB", ORANGE)])
def test_bmp(tmp_path, mode, colour):
    image = Image.new(mode, (40, 40), colour)
    image.save(tmp_path / "x.bmp")
    assert pixel(tmp_path / "x.bmp") == image.convert("RGB").getpixel((0, 0))


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [(None, ORANGE), (0, (255, 255, 255)), (1, ORANGE), (b"\x00\xff", (255, 255, 255)), (b"\xff\x00", ORANGE)],
)
def test_palette(tmp_path, transparency, expected):
    image = Image.new("P", (40, 40), 0)
    image.putpalette([*ORANGE, 0, 0, 0])
    image.save(tmp_path / "x.png", **({} if transparency is None else {"transparency": transparency}))
    assert pixel(tmp_path / "x.png") == expected


@pytest.mark.parametrize(("mode", "colour"), [("L", 77), ("RGB", ORANGE)])
def test_a_transparent_colour_is_white(tmp_path, mode, colour):
    image = Image.new(mode, (40, 40), colour)
    image.putpixel((1, 0), 0)
    image.save(tmp_path / "x.png", transparency=colour)
    result = open_rgb(tmp_path / "x.png")
    assert result.getpixel((0, 0)) == (255, 255, 255)
    assert result.getpixel((1, 0)) == (0, 0, 0)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, dtype, kind):
    # 128/257 = 0.498, 129/257 = 0.502, 32896/257 = 128
    ramp = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]], dtype=dtype)
    image = Image.fromarray(ramp)
    assert image.mode == {"<u2": "I;16", ">u2": "I;16B"}[dtype]
    image.save(tmp_path / "x", kind)
    assert np.asarray(open_rgb(tmp_path / "x"))[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 128, 254, 255, 255)]


def test_sixteen_bit_rgb_keeps_the_high_byte(tmp_path):
    # PIL reads such files but does not write them: one row of one pixel, 0xF012 0x7834 0x1E56.
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = zlib.compress(b"\x00\xf0\x12\x78\x34\x1e\x56")
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    assert pixel(tmp_path / "x.png") == (0xF0, 0x78, 0x1E)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(tmp_path, kind):
    Image.new("RGB", (40, 40), ORANGE).convert("CMYK").save(tmp_path / "x", kind)
    with Image.open(tmp_path / "x") as encoded:
        assert encoded.mode == "CMYK"
    np.testing.assert_allclose(pixel(tmp_path / "x"), ORANGE, atol=4)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixel_modes_without_a_white_level_are_refused(tmp_path, mode):
    Image.new(mode, (40, 40)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=rf"x\.tif': it cannot be decoded: its pixel mode '{mode}' is not supported"):
        open_rgb(tmp_path / "x.tif")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_the_orientation_is_followed_once(tmp_path, kind):
    image = Image.new("RGB", (48, 40), "black")
    image.paste("white", (0, 0, 16, 16))  # upper left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "x", kind, exif=exif)
    turned = open_rgb(tmp_path / "x")
    assert turned.size == (40, 48)
    assert turned.getpixel((36, 4)) > (240, 240, 240)  # upper right
    assert turned.getpixel((4, 4)) < (15, 15, 15)


def test_of_several_pages_the_first_is_taken(tmp_path):
    pages = [Image.new("RGB", (40, 40), colour) for colour in (ORANGE, (0, 0, 0))]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    assert pixel(tmp_path / "x.tif") == ORANGE


def test_the_suffix_does_not_matter(tmp_path):
    Image.new("RGB", (40, 40), ORANGE).save(tmp_path / "x.png", "TIFF")
    assert pixel(tmp_path / "x.png") == ORANGE


def test_large_images_are_read_and_much_larger_ones_refused(tmp_path, monkeypatch):
    noise(40, 48).save(tmp_path / "x.png")  # 1920 px
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert open_rgb(tmp_path / "x.png").size == (48, 40)
    assert find_faults([tmp_path / "x.png"]) == {}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match=r"it cannot be decoded: Image size .* exceeds limit"):
        open_rgb(tmp_path / "x.png")
    assert "exceeds limit" in find_faults([tmp_path / "x.png"])[tmp_path / "x.png"]


def test_the_warning_filters_stay_the_same(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for path in paths:
        noise().save(path)
    before = list(warnings.filters)
    open_rgb(paths[0])
    find_faults(paths)
    assert warnings.filters == before


FILES = {
    "png": encode(noise(), "PNG"),
    "jpg": encode(noise(), "JPEG"),
    "progressive.jpg": encode(noise(), "JPEG", progressive=True),
    "tif": encode(noise(), "TIFF"),
    "lzw.tif": encode(noise(), "TIFF", compression="tiff_lzw"),
    "bmp": encode(noise(), "BMP"),
    "grey.bmp": encode(noise().convert("L"), "BMP"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.98])
def test_truncated_files_are_refused(tmp_path, name, share):
    path = tmp_path / name
    path.write_bytes(FILES[name][: int(share * len(FILES[name]))])
    with pytest.raises(ValueError, match=re.escape(f"path must be an image file, got {str(path)!r}: it ")) as caught:
        open_rgb(path)
    assert str(caught.value).count("\n") == 0
    assert find_faults([path])[path] in str(caught.value)


def test_pil_does_not_pad_truncated_files():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@settings(deadline=None, max_examples=500)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_a_file_truncated_anywhere_is_complete_or_refused(tmp_path_factory, name, data):
    content = FILES[name]
    path = tmp_path_factory.getbasetemp() / "cut"
    path.write_bytes(content)
    expected = open_rgb(path)
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        result = open_rgb(path)
    except ValueError:
        return
    assert result.tobytes() == expected.tobytes()  # such as a PNG without its last chunk


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_nothing_but_value_error_escapes_from_damaged_files(tmp_path_factory, name, data):
    damaged = bytearray(FILES[name])
    offsets = st.one_of(st.integers(0, 200), st.integers(0, len(damaged) - 1))  # headers are short but matter most
    for offset, value in data.draw(st.lists(st.tuples(offsets, st.integers(0, 255)), min_size=1, max_size=8)):
        damaged[offset] = value
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(damaged))] * 2)))
    if data.draw(st.booleans()):
        del damaged[start : min(stop, start + 64)]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    try:
        result = open_rgb(path)
    except ValueError:
        assert path in find_faults([path])
        return
    assert result.mode == "RGB"
    if name == "png":  # its header has a checksum
        assert result.size == (48, 40)


def test_find_faults_gives_reasons(tmp_path):
    good, small = tmp_path / "good.png", tmp_path / "small.png"
    noise().save(good)
    noise(31, 48).save(small)
    cut, empty, text, folder, missing = (tmp_path / f"{name}.png" for name in ("cut", "empty", "text", "dir", "none"))
    cut.write_bytes(FILES["png"][:2000])
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


def test_find_faults_keeps_the_order_and_draws_a_bar(tmp_path, capsys):
    paths = [tmp_path / f"{i}.png" for i in range(50)]
    for path in paths[::2]:
        noise().save(path)
    assert list(find_faults(paths)) == paths[1::2]
    assert "50/50" in capsys.readouterr().err
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
