"""What becomes of the pixels of an image."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from breakhis.data.images import find_faults, open_rgb
from PIL import Image

from tests.support.pictures import noise

ORANGE = (240, 120, 30)


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
