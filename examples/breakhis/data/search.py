"""Search a folder for files, through links too, in an order that does not depend on the file system."""

import errno
import logging
import os
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from breakhis.names import printable

logger = logging.getLogger(__name__)

Identity = tuple[int, int] | str


class Tree(NamedTuple):
    """What `search` finds."""

    files: list[Path]
    """The files. They begin with the folder that was searched, and are sorted by the rest in POSIX notation."""
    folders: list[Path]
    """Every folder that was looked into, as it was reached."""


def search(directory: Path, suffixes: Collection[str]) -> Tree:
    """Find the files with some suffixes below a folder, at any depth.

    Links to folders and files are followed. A folder or a file that is reached in several ways counts once, by the way
    with no link if there is one; so loops end. Hidden names, and those that macOS adds to archives (`._name`,
    `__MACOSX`), are left out. Links to nothing and special files are in the list if they have the suffix: nothing is
    opened here. The log names the folders that cannot be read, and broken links without the suffix.

    Args:
        directory: The folder.
        suffixes: The suffixes in lower case, such as ".png".
    """
    files: list[tuple[bool, str, Path]] = []
    folders: dict[Identity, Path] = {}
    pending, links = [directory], []
    while pending or links:
        if not pending:
            links.sort(key=Path.as_posix, reverse=True)
        folder = pending.pop() if pending else links.pop()
        try:
            place = identity(folder)
            if place in folders:
                continue
            folders[place] = folder
            with os.scandir(folder) as scan:
                entries = [entry for entry in scan if not entry.name.startswith(".") and entry.name != "__MACOSX"]
        except OSError as error:
            logger.warning("WARNING: left out the folder %s: %s", printable(folder), error.strerror)
            continue
        for entry in entries:
            path, is_link = folder / entry.name, entry.is_symlink()
            if os.path.isdir(path) if is_link else entry.is_dir():
                (links if is_link else pending).append(path)
            elif path.suffix.lower() in suffixes:
                files.append((is_link, path.as_posix(), path))
            elif is_link and (reason := broken_link(path)):
                logger.warning("WARNING: left out %s: %s", printable(path), reason)
    paths = _drop_repeats(path for _, _, path in sorted(files))
    return Tree(sorted(paths, key=lambda path: path.relative_to(directory).as_posix()), list(folders.values()))


def identity(path: Path) -> Identity:
    """Return what is the same for all names of one file or folder, links and hard links included.

    Raises:
        OSError: There is no such file.
    """
    status = path.stat()
    # Some file systems of Windows number nothing.
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def broken_link(path: Path) -> str | None:
    """Return in one sentence why a link leads nowhere, or None for links that lead somewhere and for no links."""
    try:
        path.stat()
    except OSError as error:
        leads_to_nothing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        reason = "it is a link to nothing" if leads_to_nothing else f"it is a link that fails: {error.strerror}"
        return reason if path.is_symlink() else None
    return None


def special_kind(path: Path) -> str | None:
    """Return what a special file is, such as "a pipe", or None for others. Opening one could block or do harm.

    Raises:
        OSError: There is no such file.
    """
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(path.stat().st_mode))


def _drop_repeats(paths: Iterable[Path]) -> list[Path]:
    """Return the first path of each file; the log counts the other ones."""
    first_of: dict[Identity, Path] = {}
    repeats: list[Path] = []
    for path in paths:
        try:
            place = identity(path)
        except OSError:
            place = path.as_posix()  # such as a link to nothing
        if first_of.setdefault(place, path) is not path:
            repeats.append(path)
    if repeats:
        logger.warning(
            "left out %d further names of files that links lead to, such as %s", len(repeats), printable(repeats[0])
        )
    return list(first_of.values())
