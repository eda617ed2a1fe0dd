"""Read image files of any common kind as 8-bit RGB, and find the files that cannot be read."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
MIN_SIDE = 32  # px; the networks halve height and width five times

# Judged by content. PIL reads other formats too, and would give PostScript to an interpreter.
_FORMATS = ("BMP", "JPEG", "PNG", "TIFF")
_THREADS = 8  # this many decoded images are in memory at once


def image_files(directory: Path) -> list[Path]:
    """List the image files below a directory, at any depth, recognised by their suffix.

    Hidden files and folders are left out, and so are the files that macOS adds to archives (`._name`, `__MACOSX`).

    Args:
        directory: Directory to look in.

    Returns:
        Paths that begin with `directory`, sorted by their remaining part in POSIX notation.

    Raises:
        ValueError: `directory` is not a directory.
    """
    if not directory.is_dir():
        raise ValueError(f"directory must be a directory, got {str(directory)!r}")
    names = [
        path.relative_to(directory)
        for path in directory.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()  # keep a broken link: it is a fault to report
    ]
    visible = [name for name in names if not any(part.startswith(".") or part == "__MACOSX" for part in name.parts)]
    return [directory / name for name in sorted(visible, key=Path.as_posix)]


def open_rgb(path: Path) -> Image.Image:
    """Decode an image file with any pixels: 1-bit, grey, palette, CMYK, 16-bit, with or without transparency.

    16 bits are scaled to 8 with 65535 as white, even if the camera used fewer bits. Transparent pixels become white,
    the colour of unstained glass. The image is turned as EXIF says. Of several pages the first is read.

    Args:
        path: A BMP, JPEG, PNG or TIFF file; its suffix does not matter.

    Returns:
        The complete image in 8-bit RGB.

    Raises:
        ValueError: The file cannot be decoded, for example because it is truncated; the message says why. Flipped bits
            in a JPEG may stay unnoticed: it has no checksum.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata and large images; both are read anyway
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
        bar = tqdm(pool.map(_fault, paths), "checking images", len(paths), unit="image")
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


def _decode(path: Path) -> Image.Image:
    with path.open("rb") as file:  # PIL maps a path into memory, and a file that shrinks would then kill the process
        if not file.peek(1):
            raise ValueError("it has zero bytes")
        with Image.open(file, formats=_FORMATS) as encoded:
            image = ImageOps.exif_transpose(encoded)
    if image.mode in ("I", "F", "La"):
        raise ValueError(f"its pixel mode {image.mode!r} is not supported")
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))  # PIL alone would clip at 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    """Return one sentence for an error of PIL or the file system."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not a BMP, JPEG, PNG or TIFF image"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be opened: {error.strerror}"
    return f"it cannot be decoded: {str(error) or type(error).__name__}"
