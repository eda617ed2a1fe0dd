"""Know files again by their content."""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_THREADS = 8  # hashing releases Python's lock, and several files wait for the disk at once


def hash_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Compute the SHA-256 of each file, as `sha256sum` prints it, in the order of `paths`."""
    paths = list(paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(paths, pool.map(_hash, paths), strict=True))


def changed_files(hashes: Mapping[Path, str]) -> list[Path]:
    """List the files whose content is no longer that of their hash, or that are no longer there."""
    there = [path for path in hashes if path.is_file()]
    now = hash_files(there)
    return [path for path, digest in hashes.items() if now.get(path) != digest]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
