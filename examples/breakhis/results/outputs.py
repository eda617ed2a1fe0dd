"""Where results may be written: never over an input, and each to a file of its own."""

import csv
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

from breakhis.data.search import identity
from breakhis.files import real_path
from breakhis.names import MAX_BYTES, with_hash

_FIRST_LINE = 100_000  # bytes of a table to look at


def check_table(path: Path, columns: Sequence[str]) -> None:
    """Refuse to replace a file that is no table with these first columns, so nothing that a script did not write.

    Args:
        path: A file to be written, which need not exist.
        columns: Names of the first columns that the new table will have.

    Raises:
        OSError: The name is too long, or the file cannot be read.
        ValueError: Another file is there.
    """
    if not path.exists():  # a link to nothing is replaced
        return
    header: list[str] = []
    if path.is_file():  # a pipe or a device would be replaced too
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            header = next(csv.reader([file.readline(_FIRST_LINE)]), [])
    if header[: len(columns)] != list(columns):
        raise ValueError(f"must not replace a file that is no earlier table of this script, got {str(path)!r}")


def check_not_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse to replace an input, also by a link or a hard link to it.

    Args:
        outputs: Files to be written, which need not exist.
        inputs: Files that are read.

    Raises:
        ValueError: An output is an input; the message names both.
    """
    inputs_by_identity = {identity(path): path for path in inputs if path.exists()}
    for path in outputs:
        if path.exists() and (input_path := inputs_by_identity.get(identity(path))) is not None:
            raise ValueError(f"must not replace an input, got {str(path)!r}, which is the file {str(input_path)!r}")


def check_outside(folder: Path, searched: Collection[Path]) -> None:
    """Refuse a folder for results that lies in a folder whose files are read.

    Raises:
        ValueError: The next run would take the results for inputs.
    """
    for other_folder in searched:
        if real_path(folder).is_relative_to(real_path(other_folder)):
            raise ValueError(f"must not lie in {str(other_folder)!r}, whose images are read, got {str(folder)!r}")


def overlay_paths(names: Sequence[str], folder: Path) -> list[Path]:
    """Choose a PNG file for each image: the image's name with this suffix.

    If a.png and a.jpg lie in one folder, their files are a-png.png and a-jpg.png. A name that would be too long, that
    another image's folder has, or that a file system which ignores case or the way of writing accents would take for
    another one, gets a short hash.

    Args:
        names: Names of the images in POSIX notation, relative to their directory.
        folder: Folder for the files.
    """
    taken = {_alike(str(parent)) for name in names for parent in PurePosixPath(name).parents}
    stems = Counter(_alike(_without_suffix(name)) for name in names)
    paths = []
    for name in names:
        path = PurePosixPath(name)
        place, stem = path.parent, path.stem
        if stems[_alike(_without_suffix(name))] > 1:
            stem += f"-{path.suffix.removeprefix('.')}"
        target = f"{stem}.png"
        if len(os.fsencode(target)) > MAX_BYTES or _alike(str(place / target)) in taken:
            target = with_hash(path.name, name, ".png")
        taken.add(_alike(str(place / target)))
        paths.append(folder / place / target)
    return paths


def _without_suffix(name: str) -> str:
    """Return the name of an image without its suffix; unlike `with_suffix`, for names of dots too."""
    path = PurePosixPath(name)
    return str(path.parent / path.stem)


def _alike(name: str) -> str:
    """Return what is the same for all names that some file system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()
