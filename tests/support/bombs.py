"""Small image files that state huge sizes. Those that are large have holes, which take no space on the disk."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

HUGE = 400 * 2**20  # bytes or pixels


def _chunk(name: bytes, data: bytes) -> bytes:
    """Make a chunk of PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_start(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def _png_end(width: int, height: int) -> bytes:
    return _chunk(b"IDAT", zlib.compress(bytes(height * (1 + width)))) + _chunk(b"IEND", b"")


def png(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """Make a PNG of one colour, grey (`colour` 0) or with more channels, whose pixels are compressed in steps."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    packer, row = zlib.compressobj(1), bytes(1 + width * channels * depth // 8)
    data = b"".join([packer.compress(row) for _ in range(height)]) + packer.flush()
    return _png_start(width, height, depth, colour) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _with_hole(before: bytes, hole: int, after: bytes = b"") -> Callable[[Path], None]:
    """Return the writer of a file with many zeros in its middle."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(before)
            file.seek(hole, 1)
            file.write(after)

    return write


def _huge_chunk(name: bytes, before: bytes, after: bytes) -> Callable[[Path], None]:
    """Return the writer of a PNG with a chunk of `HUGE` zeros."""
    return _with_hole(before + struct.pack(">I", HUGE) + name, HUGE + 4, after)


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes = b"") -> bytes:
    """Make a TIFF: from a tag to its type, count and value; then bytes that begin at offset 8 + 2 + 12 tags + 4."""
    entries = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def _grey(width: int, height: int, **tags: tuple[int, int, int]) -> dict[int, tuple[int, int, int]]:
    """Make the tags of an 8-bit grey TIFF without strips; `t322=...` adds tag 322."""
    short, long = 3, 4
    common = {256: (long, 1, width), 257: (long, 1, height), 258: (short, 1, 8), 259: (short, 1, 1), 262: (short, 1, 1)}
    return common | {int(name[1:]): entry for name, entry in tags.items()}


def _exif(count: int, size: int) -> bytes:
    """Make EXIF of `size` bytes, in which each of many tags states that all of it is its value."""
    entries = b"".join(struct.pack("<HHII", 0x9000 + i, 3, size // 2 - 4, 8) for i in range(count))
    return (b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4)).ljust(size, b"\0")


def _jpeg(picture: bytes, *segments: tuple[int, bytes]) -> bytes:
    """Put segments after the start of a JPEG."""
    packed = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data for marker, data in segments)
    return picture[:2] + packed + picture[2:]


def write_bombs(folder: Path, picture: bytes) -> list[Path]:
    """Write the files.

    Args:
        folder: Folder for the files.
        picture: A small JPEG.

    Returns:
        The files, named by what they state too much of.
    """
    one_row, same_value = (4, 1, 8), {f"t{60_000 + i}": (1, HUGE // 40, 2000) for i in range(60)}
    exif, segment = _exif(5000, 65_000), bytes(65_000)
    contents: dict[str, bytes | Callable[[Path], None]] = {
        "pixels.png": _png_start(12_000, 12_000) + _png_end(64, 64),
        "colours of 16 bits.png": _png_start(12_000, 12_000, 16, 6) + _png_end(64, 64),
        "many more pixels.png": _png_start(60_000, 60_000) + _png_end(64, 64),
        "pixels.tif": tiff(_grey(12_000, 12_000, t273=one_row)),
        "pixels.bmp": b"BM" + bytes(8) + struct.pack("<IIiiHHIIIIII", 54, 40, 12_000, 12_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "tile.tif": tiff(
            _grey(64, 64, t322=(4, 1, 40_000), t323=(4, 1, 40_000), t324=one_row, t325=one_row) | {259: (3, 1, 8)}
        ),
        "text.png": _huge_chunk(b"tEXt", _png_start(64, 64), _png_end(64, 64)),
        "text after the pixels.png": _huge_chunk(
            b"tEXt", _png_start(64, 64) + _png_end(64, 64)[:-12], _chunk(b"IEND", b"")
        ),
        "unknown chunk.png": _huge_chunk(b"noNe", _png_start(64, 64), _png_end(64, 64)),
        "packed text.png": _png_start(64, 64)
        + _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(HUGE // 8)))
        + _png_end(64, 64),
        "packed profile.png": _png_start(64, 64)
        + _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(HUGE // 8)))
        + _png_end(64, 64),
        "EXIF.png": _png_start(64, 64) + _chunk(b"eXIf", exif) + _png_end(64, 64),
        "EXIF.jpg": _jpeg(picture, (0xE1, b"Exif\0\0" + exif)),
        "EXIF in parts.jpg": _jpeg(
            picture, (0xE1, b"Exif\0\0" + exif), *[(0xE1, b"Exif\0\0" + segment) for _ in range(200)]
        ),
        "index of pictures.jpg": _jpeg(picture, (0xE2, b"MPF\0" + exif)),
        "segments.jpg": _jpeg(picture, *[(0xED, segment) for _ in range(400)]),
        "tag.tif": _with_hole(tiff(_grey(64, 64, t273=one_row, t700=(1, HUGE, 100))), HUGE, b"end"),
        "tags.tif": _with_hole(tiff(_grey(64, 64, t273=one_row, **same_value)), 2 * HUGE, b"end"),
        "header.bmp": _with_hole(b"BM" + bytes(8) + struct.pack("<II", 54, HUGE), HUGE, b"end"),
    }
    for name, content in contents.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)
    return [folder / name for name in contents]
