"""Fetches BreakHis from its authors and unpacks it.

The authors publish no checksum. Three things stand in for it: the size that the server announces, the checksum inside
the gzip format, and the number of images that come out.
"""

import gzip
import hashlib
import logging
import shutil
import tarfile
import time
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from breakhis.images import image_files

logger = logging.getLogger(__name__)

ARCHIVE_URL = "http://www.inf.ufpr.br/vri/databases/BreaKHis_v1.tar.gz"
NUM_IMAGES = 7909

_CHUNK = 1 << 16  # bytes; what a stalled connection can lose
_GZIP_MAGIC = b"\x1f\x8b"


def download(
    directory: Path,
    url: str = ARCHIVE_URL,
    *,
    sha256: str | None = None,
    num_images: int = NUM_IMAGES,
    max_bytes: int = 16 * 2**30,
    attempts: int = 8,
    pause: float = 1.0,
    timeout: float = 60.0,
    progress: bool = True,
) -> Path:
    """Fetches the archive, about 4 GB, and unpacks it, as far as that is not done yet.

    What arrives is kept in `BreaKHis_v1.tar.gz.part`, and a later call goes on from there unless the server's file has
    changed. `BreaKHis_v1.tar.gz` and the folder `BreaKHis_v1` appear when they are whole. The archive is kept.

    Args:
        directory: Where both are put; made if need be. It must have space for both, about 8 GB.
        url: A gzip'd tar file on a server that announces its size.
        sha256: The archive's digest in hexadecimal, where it is known.
        num_images: How many image files the archive holds.
        max_bytes: The most that may be unpacked, in bytes.
        attempts: How often to connect before giving up.
        pause: Wait before the second attempt, in s; each further one is twice as long.
        timeout: How long a connection may be silent, in s.
        progress: Whether to draw progress bars.

    Returns:
        The folder `BreaKHis_v1` in `directory`.

    Raises:
        ValueError: The answer, the archive, or the folder is not what it should be; the message says in what.
        ConnectionError: The server refused, or every attempt failed.
        OSError: The disk has too little space.
    """
    archive, tree = directory / "BreaKHis_v1.tar.gz", directory / "BreaKHis_v1"
    if tree.exists():
        _check_images(tree, num_images, tree)
        return tree
    directory.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        _fetch(url, archive, attempts, pause, timeout, progress)
    if sha256 is not None:
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256.lower():
            raise ValueError(f"{archive} must have SHA-256 {sha256}, got {digest}; delete it to fetch it again")
    _unpack(archive, tree, num_images, max_bytes, progress)
    return tree


def _fetch(url: str, archive: Path, attempts: int, pause: float, timeout: float, progress: bool) -> None:
    part = archive.with_name(f"{archive.name}.part")
    stamp = archive.with_name(f"{archive.name}.part.stamp")
    failure = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            _fetch_rest(url, part, stamp, timeout, progress)
        except HTTPError as error:
            error.close()
            if error.code == 416:  # the part is longer than the server's file is now
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise ConnectionError(f"{url} answered {error.code} {error.reason}") from error
            failure = error
        except (ConnectionError, TimeoutError, URLError, HTTPException) as error:
            failure = error
        else:
            part.replace(archive)
            stamp.unlink()
            return
        logger.warning("attempt %d of %d failed: %s", attempt + 1, attempts, failure)
    raise ConnectionError(f"{url} failed {attempts} times, at last with: {failure}") from failure


def _fetch_rest(url: str, part: Path, stamp: Path, timeout: float, progress: bool) -> None:
    """Appends to `part` what is missing, or all of it where that cannot be joined to what is there.

    `stamp` holds the size of the server's file in bytes and, after a blank, its version as an ETag or a date. A stamp
    that is cut short fits no answer, and so does no harm.
    """
    start = part.stat().st_size if part.exists() and stamp.exists() else 0
    total, _, version = stamp.read_text("utf-8").partition(" ") if start else ("", "", "")
    if start and total == str(start):  # the last run ended between the last byte and the new name
        return
    headers = {"Range": f"bytes={start}-", "If-Range": version} if version else {}
    with urlopen(Request(url, headers=headers), timeout=timeout) as answer:
        if answer.status == 206:
            told = answer.headers.get("Content-Range", "")
            if not (told.startswith(f"bytes {start}-") and told.endswith(f"/{total}")):
                part.unlink(missing_ok=True)
                raise ConnectionError(f"wanted bytes from {start} of {total}, got {told!r}")
        else:
            start, total, etag = 0, answer.length, answer.headers.get("ETag", "")
            # A weak ETag, W/"...", does not promise the same bytes.
            version = etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")
        chunk = answer.read(_CHUNK)
        if start == 0 and not _GZIP_MAGIC.startswith(chunk[:2]):
            kind = answer.headers.get("Content-Type")
            raise ValueError(f"{url} must be a gzip file, got {kind}: does this network want you to log in first?")
        if not total:
            raise ValueError(f"{url} must announce its size, got none")
        _check_space(part.parent, 2 * int(total) - start)  # pictures hardly shrink in an archive
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(total=int(total), initial=start, unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            if not start:
                stamp.write_text(f"{total} {version}", "utf-8")  # only now that the old bytes are gone
            while chunk:
                file.write(chunk)
                bar.update(len(chunk))
                chunk = answer.read(_CHUNK)
    size = part.stat().st_size
    if size > int(total):
        part.unlink()
    if size != int(total):
        raise ConnectionError(f"got {size} of {total} bytes")


def _unpack(archive: Path, tree: Path, num_images: int, max_bytes: int, progress: bool) -> None:
    _check_space(tree.parent, archive.stat().st_size)
    scratch = tree.with_name(f".{tree.name}.unpacking")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        scratch.mkdir()
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            unpacked = 0
            for member in tqdm(tar, "unpacking", unit="file", disable=not progress):
                unpacked += tarfile.BLOCKSIZE + member.size  # a block each, so that empty files count too
                if unpacked > max_bytes:
                    raise ValueError(f"{archive} must unpack to at most {max_bytes} bytes, got more")
                _check_member(member)
                _extract(tar, member, scratch / member.name)
            while stream.read(_CHUNK):  # the checksum comes last, behind what tarfile reads
                pass
        _check_images(scratch, num_images, archive)
        scratch.rename(tree)
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise ValueError(f"{archive} must be a whole archive, got: {error}; delete it to fetch it again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Writes a member that was checked; tarfile's own filters are missing from Python's first releases of 3.11."""
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tar.extractfile(member) as source, path.open("wb") as file:
        shutil.copyfileobj(source, file)


def _check_member(member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or not (member.isreg() or member.isdir()):
        kind = {tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link"}.get(member.type, "member")
        raise ValueError(f"the archive must hold only files and folders of its own, got the {kind} {member.name!r}")


def _check_images(directory: Path, num_images: int, culprit: Path) -> None:
    found = len(image_files(directory))
    if found != num_images:
        raise ValueError(f"{culprit} must hold {num_images} images, got {found}; delete it to make it anew")


def _check_space(directory: Path, wanted: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise OSError(f"{directory} must have {wanted / 2**30:.1f} GiB of free space, got {free / 2**30:.1f} GiB")
