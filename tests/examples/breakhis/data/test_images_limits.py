import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from breakhis.data import images
from breakhis.data.images import find_faults, open_rgb
from PIL import Image, ImageFile

from tests.support.bombs import png, write_bombs
from tests.support.pages import ROOT
from tests.support.pictures import encode, noise

READ_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from breakhis.data import images
if sys.argv[2] == "unlimited":
    images.MAX_PIXELS = images.MAX_METADATA = 10**12
size = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (size + 150 * 2**20,) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        print(path.name, images.open_rgb(path).size, sep=": ")
    except ValueError as error:
        print(path.name, "MemoryError" if isinstance(error.__cause__, MemoryError) else error.__cause__, sep=": ")
"""


def read_in_little_memory(folder: Path, limits: str) -> dict[str, str]:
    """Open each file in a process with 150 MiB more than it starts with; return the sizes or the reasons."""
    command = [sys.executable, "-c", READ_IN_LITTLE_MEMORY, str(folder), limits]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "examples")}
    lines = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout.splitlines()
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory in the way of Linux")
def test_no_file_takes_more_memory_than_a_field(tmp_path):
    write_bombs(tmp_path, encode(noise(64, 64), "JPEG"))
    results = read_in_little_memory(tmp_path, "limited")
    bytes_besides = f"the image must have at most {16 * 2**20} bytes besides the pixels, got more"
    too_large = "the image must have at most 100000000 px, got 12000 x 12000 px"
    assert "Image size (3600000000 pixels) exceeds limit" in results.pop("many more pixels.png")
    assert results == {
        "EXIF in parts.jpg": "(64, 64)",
        "EXIF.jpg": "(64, 64)",
        "EXIF.png": "(64, 64)",
        "colours of 16 bits.png": too_large,
        "header.bmp": bytes_besides,
        "index of pictures.jpg": "(64, 64)",
        "packed profile.png": "Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK",
        "packed text.png": "Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK",
        "pixels.bmp": too_large,
        "pixels.png": too_large,
        "pixels.tif": too_large,
        "segments.jpg": bytes_besides,
        "tag.tif": bytes_besides,
        "tags.tif": bytes_besides,
        "text after the pixels.png": bytes_besides,
        "text.png": bytes_besides,
        "tile.tif": "the tile must have at most 100000000 px, got 40000 x 40000 px",
        "unknown chunk.png": bytes_besides,
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory in the way of Linux")
def test_without_the_limits_files_take_more_memory(tmp_path):
    for path in write_bombs(tmp_path, encode(noise(64, 64), "JPEG")):
        if path.name not in ("colours of 16 bits.png", "tags.tif", "tag.tif", "text.png"):
            path.unlink()
    assert set(read_in_little_memory(tmp_path, "unlimited").values()) == {"MemoryError"}


@pytest.mark.parametrize("size", [(10_001, 10_000), (100_000_001, 1)])
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch, size):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    path = tmp_path / "x.png"
    path.write_bytes(png(8, 8).replace(struct.pack(">II", 8, 8), struct.pack(">II", *size)))
    content = bytearray(path.read_bytes())
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    reason = f"the image must have at most 100000000 px, got {size[0]} x {size[1]} px"
    assert find_faults([path]) == {path: reason}
    with pytest.raises(ValueError, match=re.escape(f"{str(path)!r}: {reason}")):
        open_rgb(path)


def test_the_limit_itself_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 48)
    noise(40, 48).save(tmp_path / "x.png")
    noise(41, 48).save(tmp_path / "y.png")
    assert find_faults([tmp_path / "x.png", tmp_path / "y.png"]) == {
        tmp_path / "y.png": "the image must have at most 1920 px, got 48 x 41 px"
    }


def test_of_large_images_one_is_decoded_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_LARGE", 100)
    decoding, most, to_rgb = [], [], images._to_rgb

    def count(image: Image.Image) -> Image.Image:
        decoding.append(image)
        most.append(len(decoding))
        result = to_rgb(image)
        decoding.remove(image)
        return result

    monkeypatch.setattr(images, "_to_rgb", count)
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for path in paths:
        noise(200, 200).save(path)
    assert find_faults(paths) == {}
    assert max(most) == 1
    assert len(most) == 20


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "BMP"])
def test_noise_which_cannot_be_compressed_is_within_the_limits(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(images, "MAX_METADATA", 2000)  # a file of noise is longer than its pixels
    picture = noise(300, 300) if kind in ("JPEG", "BMP") else noise(300, 300).convert("RGBA")
    picture.save(tmp_path / "x", kind, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))
    assert open_rgb(tmp_path / "x").size == (300, 300)
