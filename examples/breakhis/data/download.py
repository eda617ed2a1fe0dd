"""Fetch BreakHis from its authors and unpack it.

The authors publish no checksum. Three checks take its place: the size that the server announces, the checksum inside
the gzip file, and the number of unpacked images.
"""

import gzip
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

from breakhis.data.images import image_files

logger = logging.getLogger(__name__)

ARCHIVE_URL = "http://www.inf.ufpr.br/vri/databases/BreaKHis_v1.tar.gz"
NUM_IMAGES = 7909
MAX_BYTES = 16 * 2**30  # bytes that may be unpacked at most
ATTEMPTS = 8  # connections before giving up
PAUSE = 1.0  # s; the wait before the second attempt, each further one is twice as long
TIMEOUT = 60.0  # s; how long a connection may be silent

_CHUNK = 1 << 16  # bytes; a stalled connection loses this much at most
_GZIP_MAGIC = b"\x1f\x8b"


def download(directory: Path) -> Path:
    """Fetch the archive from `ARCHIVE_URL`, about 4 GB, and unpack it; leave out the steps that are already done.

    An incomplete archive is kept as `BreaKHis_v1.tar.gz.part`, and a later call goes on from there unless the server's
    file has changed. `BreaKHis_v1.tar.gz` and the folder `BreaKHis_v1` appear when they are complete. The archive is
    kept.

    Args:
        directory: Directory for the archive and the folder; made if needed. It must have space for both, about 8 GB.

    Returns:
        The folder `BreaKHis_v1` in `directory`.

    Raises:
        ValueError: The answer of the server, the archive or the folder is wrong; the message says how.
        ConnectionError: The server refused, or every attempt failed.
        OSError: The disk has too little space.
    """
    archive, tree = directory / "BreaKHis_v1.tar.gz", directory / "BreaKHis_v1"
    if tree.exists():
        _check_images(tree, tree)
        return tree
    directory.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        _fetch(ARCHIVE_URL, archive)
    _unpack(archive, tree)
    return tree


def _fetch(url: str, archive: Path) -> None:
    """Fetch the archive, with several attempts."""
    part = archive.with_name(f"{archive.name}.part")
    stamp = archive.with_name(f"{archive.name}.part.stamp")
    failure = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            _fetch_rest(url, part, stamp)
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
        logger.warning("attempt %d of %d failed: %s", attempt + 1, ATTEMPTS, failure)
    raise ConnectionError(f"{url} failed {ATTEMPTS} times, at last with: {failure}") from failure


def _fetch_rest(url: str, part: Path, stamp: Path) -> None:
    """Append the missing bytes to `part`, or write all bytes if the server's file cannot continue it.

    `stamp` holds the size of the server's file in bytes and, after a blank, its version as an ETag or a date. A stamp
    that was cut short matches no answer, so it is harmless.
    """
    start = part.stat().st_size if part.exists() and stamp.exists() else 0
    total, _, version = stamp.read_text("utf-8").partition(" ") if start else ("", "", "")
    if start and total == str(start):  # an earlier run was killed after the last byte and before the renaming
        return
    headers = {"Range": f"bytes={start}-", "If-Range": version} if version else {}
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as answer:
        if answer.status == 206:
            content_range = answer.headers.get("Content-Range", "")
            if not (content_range.startswith(f"bytes {start}-") and content_range.endswith(f"/{total}")):
                part.unlink(missing_ok=True)
                raise ConnectionError(f"wanted bytes from {start} of {total}, got {content_range!r}")
        else:
            start, total, etag = 0, answer.length, answer.headers.get("ETag", "")
            # The same weak ETag, W/"...", does not promise the same bytes.
            version = etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")
        chunk = answer.read(_CHUNK)
        if start == 0 and not _GZIP_MAGIC.startswith(chunk[:2]):
            kind = answer.headers.get("Content-Type")
            raise ValueError(f"{url} must be a gzip file, got {kind}: does this network want you to log in first?")
        if not total:
            raise ValueError(f"{url} must announce its size, got none")
        _check_space(part.parent, 2 * int(total) - start)  # images hardly shrink in an archive
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(total=int(total), initial=start, unit="B", unit_scale=True) as bar,
        ):
            if not start:
                stamp.write_text(f"{total} {version}", "utf-8")  # not earlier: the old bytes are gone only now
            while chunk:
                file.write(chunk)
                bar.update(len(chunk))
                chunk = answer.read(_CHUNK)
    size = part.stat().st_size
    if size > int(total):
        part.unlink()
    if size != int(total):
        raise ConnectionError(f"got {size} of {total} bytes")


def _unpack(archive: Path, tree: Path) -> None:
    """Unpack the archive next to `tree`, check it, and give it the name."""
    _check_space(tree.parent, archive.stat().st_size)
    scratch = tree.with_name(f".{tree.name}.unpacking")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
    try:
        scratch.mkdir()
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            unpacked = 0
            for member in tqdm(tar, "unpacking", unit="file"):
                unpacked += tarfile.BLOCKSIZE + member.size  # one block each, so that empty files count too
                if unpacked > MAX_BYTES:
                    raise ValueError(f"{archive} must unpack to at most {MAX_BYTES} bytes, got more")
                _check_member(member)
                _extract(tar, member, scratch / member.name)
            while stream.read(_CHUNK):  # the checksum comes last, after the part that tarfile reads
                pass
        _check_images(scratch, archive)
        scratch.rename(tree)
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise ValueError(f"{archive} must be a whole archive, got: {error}; delete it to fetch it again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write a member after its check. The first releases of Python 3.11 lack tarfile's own filters."""
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tar.extractfile(member) as source, path.open("wb") as file:
        shutil.copyfileobj(source, file)


def _check_member(member: tarfile.TarInfo) -> None:
    """Refuse a member that could write outside of the folder."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or not (member.isreg() or member.isdir()):
        kind = {tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link"}.get(member.type, "member")
        raise ValueError(f"the archive must hold only files and folders of its own, got the {kind} {member.name!r}")


def _check_images(directory: Path, origin: Path) -> None:
    """Refuse a directory with another number of images, and name the file or folder to delete."""
    count = len(image_files(directory))
    if count != NUM_IMAGES:
        raise ValueError(f"{origin} must hold {NUM_IMAGES} images, got {count}; delete it to make it anew")


def _check_space(directory: Path, wanted: int) -> None:
    """Refuse a disk with fewer than `wanted` free bytes."""
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise OSError(f"{directory} must have {wanted / 2**30:.1f} GiB of free space, got {free / 2**30:.1f} GiB")
