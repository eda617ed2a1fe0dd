"""Read image files of any common kind as 8-bit RGB, and find the files that cannot be read."""

import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from breakhis.data.metered import MeteredFile
from breakhis.data.search import broken_link, search, special_kind
from breakhis.names import printable

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
MIN_SIDE = 32  # px; the networks halve height and width five times
# The largest sensors of cameras have as many pixels, BreakHis 0.3 million. Files above are whole slides, which must be
# cut into fields, or bombs. Decoding takes up to 16 bytes per pixel: 1.6 GB in a process that loads one image at a
# time, and 3 GB in `find_faults`.
MAX_PIXELS = 100_000_000
MAX_METADATA = 16 * 2**20  # bytes of a file that are no pixels: text, colour profile, camera data, tables of offsets

# Judged by content. PIL reads other formats too, and would give PostScript to an interpreter.
_FORMATS = ("BMP", "JPEG", "PNG", "TIFF")
_THREADS = 8  # this many images are decoded at once, but of the large ones only one
_LARGE = MAX_PIXELS // _THREADS  # px
_ONE_LARGE_IMAGE = threading.Lock()
_BYTES_PER_PIXEL = 8  # of uncompressed data: four channels of 16 bits
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF


def image_files(directory: Path) -> list[Path]:
    """List the image files below a directory, at any depth, recognised by their suffix; `search` says how.

    Args:
        directory: Directory to look in.

    Returns:
        Paths that begin with `directory`, sorted by their remaining part in POSIX notation.

    Raises:
        ValueError: `directory` is not a directory.
    """
    if not directory.is_dir():
        raise ValueError(f"directory must be a directory, got {str(directory)!r}")
    return search(directory, IMAGE_SUFFIXES).files


def open_rgb(path: Path) -> Image.Image:
    """Decode an image file with any pixels: 1-bit, grey, palette, CMYK, 16-bit, with or without transparency.

    16 bits are scaled to 8 with 65535 as white, even if the camera used fewer bits. Transparent pixels become white,
    the colour of unstained glass. The image is turned as EXIF says. Of several pages the first is read.

    Args:
        path: A BMP, JPEG, PNG or TIFF file; its suffix does not matter.

    Returns:
        The complete image in 8-bit RGB.

    Raises:
        ValueError: The file cannot be decoded, for example because it is truncated; it is a special file, such as a
            pipe; or it has more than `MAX_PIXELS` pixels or `MAX_METADATA` other bytes, which is found out before they
            are read. The message says why. Flipped bits in a JPEG may stay unnoticed: it has no checksum.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata, which does no harm
        try:
            return _decode(path)
        except Exception as error:  # PIL raises a dozen types for damaged data
            raise ValueError(f"path must be an image file, got {str(path)!r}: {_reason(error)}") from error


def find_faults(paths: Sequence[Path]) -> dict[Path, str]:
    """Decode each file once, in threads, to find the files that cannot be used.

    Args:
        paths: The image files.

    Returns:
        A reason, of one sentence, for each file that cannot be decoded or is smaller than 32 px in height or width, in
        the order of `paths`.
    """
    # Warning filters belong to the process: set them here, not in each thread.
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore")
        bar = tqdm(pool.map(_fault, paths), "checking images", len(paths), unit="image", disable=None)
        return {path: reason for path, reason in zip(paths, bar, strict=True) if reason}


def _fault(path: Path) -> str | None:
    """Return why a file cannot be used, or None."""
    try:
        width, height = _decode(path).size
    except Exception as error:  # as in `open_rgb`
        return _reason(error)
    if min(width, height) < MIN_SIDE:
        return f"the image is {width} x {height} px, smaller than {MIN_SIDE} px in height or width"
    return None


class _UnusableError(ValueError):
    """A reason that is a complete sentence."""


def _decode(path: Path) -> Image.Image:
    if reason := broken_link(path):
        raise _UnusableError(reason)
    if kind := special_kind(path):
        raise _UnusableError(f"it is {kind}, not a file")
    with path.open("rb") as file:  # PIL maps a path into memory, and a file that shrinks would then kill the process
        if not file.peek(1):
            raise ValueError("it has zero bytes")
        refusal = f"the image must have at most {MAX_METADATA} bytes besides the pixels, got more"
        metered = MeteredFile(file, MAX_METADATA, _UnusableError(refusal))
        with Image.open(metered, formats=_FORMATS) as encoded:  # reads the metadata alone
            _check_size(encoded)
            metered.left = MAX_METADATA + _BYTES_PER_PIXEL * encoded.width * encoded.height
            with _ONE_LARGE_IMAGE if encoded.width * encoded.height > _LARGE else nullcontext():
                ImageOps.exif_transpose(encoded, in_place=True)
                return _to_rgb(encoded)


def _check_size(encoded: Image.Image) -> None:
    """Refuse an image by what its header says, before the pixels are decoded."""
    tags = getattr(encoded, "tag_v2", {})
    tile = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)  # the decoder has one whole tile in memory
    for name, (width, height) in (("image", encoded.size), ("tile", tile)):
        if width * height > MAX_PIXELS:
            raise _UnusableError(f"the {name} must have at most {MAX_PIXELS} px, got {width} x {height} px")
    if encoded.mode in ("I", "F", "La"):
        raise ValueError(f"its pixel mode {encoded.mode!r} is not supported")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the pixels as 8-bit RGB."""
    if image.mode.startswith("I;16"):
        # PIL alone would clip at 255. This is v / 257, rounded, in less memory than floating-point numbers take.
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    """Return one sentence for an error of PIL or the file system."""
    if isinstance(error, _UnusableError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "it is not a BMP, JPEG, PNG or TIFF image"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be opened: {error.strerror}"
    return f"it cannot be decoded: {printable(error) or type(error).__name__}"
