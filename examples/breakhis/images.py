"""Turns image files of any common kind into 8-bit RGB pictures, and says which files cannot be."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
MIN_SIDE = 32  # px; the networks halve height and width five times

_FORMATS = ("BMP", "JPEG", "PNG", "TIFF")  # by content; PIL would also hand PostScript to an interpreter
_THREADS = 8  # as many decoded pictures are in memory at once


def image_files(directory: Path) -> list[Path]:
    """The image files below a directory, told by their suffix, at any depth.

    Hidden files and folders are left out, and so is what macOS adds to archives (`._name`, `__MACOSX`).

    Args:
        directory: Where to look.

    Returns:
        Paths that begin with `directory`, sorted by what follows, in POSIX form.

    Raises:
        ValueError: `directory` is no directory.
    """
    if not directory.is_dir():
        raise ValueError(f"directory must be a directory, got {str(directory)!r}")
    names = [
        path.relative_to(directory)
        for path in directory.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()  # a link that leads nowhere is a fault to report
    ]
    wanted = [name for name in names if not any(part.startswith(".") or part == "__MACOSX" for part in name.parts)]
    return [directory / name for name in sorted(wanted, key=Path.as_posix)]


def open_rgb(path: Path) -> Image.Image:
    """Decodes an image file whatever its pixels are: 1-bit, grey, palette, CMYK, 16-bit, with or without transparency.

    16 bits are scaled to 8 with 65535 as white, also where a camera used fewer of them. Transparency is laid on white,
    the colour of unstained glass. The orientation in EXIF is followed. Of several pages the first is taken.

    Args:
        path: A BMP, JPEG, PNG or TIFF file; its suffix does not matter.

    Returns:
        The whole picture in 8-bit RGB.

    Raises:
        ValueError: The file cannot be decoded; the message says why. Truncated files are among these.
            Flipped bits in a JPEG need not be: it has no checksum.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd metadata and on large pictures; both are served
        try:
            return _decode(path)
        except Exception as error:  # PIL raises a dozen types on damaged data
            raise ValueError(f"path must be an image file, got {str(path)!r}: {_reason(error)}") from error


def find_faults(paths: Sequence[Path], *, progress: bool = True) -> dict[Path, str]:
    """Decodes each file once, in threads, to find those that cannot be used.

    Args:
        paths: Image files.
        progress: Whether to draw a progress bar.

    Returns:
        A reason, of one sentence, for each file that cannot be decoded or is smaller than 32 px in height or width, in
        the order of `paths`.
    """
    # The filters belong to the process, so that threads must not set them each.
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore")
        bar = tqdm(pool.map(_fault, paths), "checking images", len(paths), unit="image", disable=not progress)
        return {path: reason for path, reason in zip(paths, bar, strict=True) if reason}


def _fault(path: Path) -> str | None:
    try:
        width, height = _decode(path).size
    except Exception as error:  # as in `open_rgb`
        return _reason(error)
    if min(width, height) < MIN_SIDE:
        return f"the image is {width} x {height} px, smaller than {MIN_SIDE} px in height or width"
    return None


def _decode(path: Path) -> Image.Image:
    with path.open("rb") as file:  # given a path, PIL maps it to memory, and a file that shrinks then kills the process
        if not file.peek(1):
            raise ValueError("it has zero bytes")
        with Image.open(file, formats=_FORMATS) as encoded:
            image = ImageOps.exif_transpose(encoded)
    if image.mode in ("I", "F", "La"):
        raise ValueError(f"its pixel mode {image.mode!r} is not supported")
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))  # PIL would clip at 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no BMP, JPEG, PNG or TIFF image"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be opened: {error.strerror}"
    return f"it cannot be decoded: {str(error) or type(error).__name__}"
