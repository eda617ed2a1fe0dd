"""Fetch BreakHis from its authors and unpack it.

The authors publish no hash. Four checks take its place: the connection is encrypted, and the server proves its name;
the size that the server announces; the checksum inside the gzip file; the number of unpacked images. The log says the
SHA-256 of the archive, with which a later download can be compared.
"""

import gzip
import hashlib
import logging
import shutil
import tarfile
import time
import zlib
from http.client import HTTPException, HTTPMessage
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from breakhis.data.images import image_files
from breakhis.data.metered import MeteredFile
from breakhis.names import printable

logger = logging.getLogger(__name__)

ARCHIVE_URL = "https://www.inf.ufpr.br/vri/databases/BreaKHis_v1.tar.gz"
NUM_IMAGES = 7909
MAX_BYTES = 16 * 2**30  # bytes that may be unpacked at most
MAX_HEADERS = 64 * 2**20  # bytes for names and sizes at most; 8,000 files with long names take 12 MB
ATTEMPTS = 8  # connections before giving up
PAUSE = 1.0  # s; the wait before the second attempt, each further one is twice as long
TIMEOUT = 60.0  # s; how long a connection may be silent

_CHUNK = 1 << 16  # bytes; a stalled connection loses this much at most
_GZIP_MAGIC = b"\x1f\x8b"


def download(directory: Path, sha256: str | None = None) -> Path:
    """Fetch the archive from `ARCHIVE_URL`, about 4 GB, and unpack it; leave out the steps that are already done.

    An incomplete archive is kept as `BreaKHis_v1.tar.gz.part`, and a later call goes on from there unless the server's
    file has changed. `BreaKHis_v1.tar.gz` and the folder `BreaKHis_v1` appear when they are complete. The archive is
    kept.

    Args:
        directory: Directory for the archive and the folder; made if needed. It must have space for both, about 8 GB.
        sha256: Hash that the archive must have before it is unpacked, in lower-case hexadecimal digits; None: any.

    Returns:
        The folder `BreaKHis_v1` in `directory`.

    Raises:
        ValueError: The answer of the server, the archive, its hash or the folder is wrong; the message says how.
        ConnectionError: The server refused, or every attempt failed.
        OSError: The disk has too little space.
    """
    archive, tree = directory / "BreaKHis_v1.tar.gz", directory / "BreaKHis_v1"
    if tree.exists() and sha256 is None:
        _check_images(tree, tree)
        return tree
    if tree.exists() and not archive.exists():
        raise ValueError(f"{tree} must lie next to its archive, {archive.name}, for the check of the SHA-256, got none")
    directory.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        _fetch(ARCHIVE_URL, archive)
    _check_hash(archive, sha256)
    if tree.exists():
        _check_images(tree, tree)
    else:
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
        logger.warning("attempt %d of %d failed: %s", attempt + 1, ATTEMPTS, printable(failure))
    raise ConnectionError(f"{url} failed {ATTEMPTS} times, at last with: {failure}") from failure


class _StayEncrypted(HTTPRedirectHandler):
    """Follows a redirection, but never from https to a protocol in which others could change the answer."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise ValueError(f"{req.full_url} must not lead away from https, got a redirection to {newurl!r}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


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
    with build_opener(_StayEncrypted).open(Request(url, headers=headers), timeout=TIMEOUT) as answer:
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
            tqdm(total=int(total), initial=start, unit="B", unit_scale=True, disable=None) as bar,
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
        refusal = ValueError(f"{archive} must have at most {MAX_HEADERS} bytes of headers, got more")
        with gzip.open(archive) as stream:
            # tarfile reads a header of any size that the archive states, so its reads are limited.
            metered = MeteredFile(stream, MAX_HEADERS, refusal)
            with tarfile.open(fileobj=metered, mode="r:") as tar:
                unpacked = 0
                for member in tqdm(tar, "unpacking", unit="file", disable=None):
                    unpacked += tarfile.BLOCKSIZE + member.size  # one block each, so that empty files count too
                    if unpacked > MAX_BYTES:
                        raise ValueError(f"{archive} must unpack to at most {MAX_BYTES} bytes, got more")
                    _check_member(member)
                    metered.left += member.size  # the file's content
                    _extract(tar, member, scratch / member.name)
                while metered.read(_CHUNK):  # the checksum comes last, after the part that tarfile reads
                    pass
        _check_images(scratch, archive)
        scratch.rename(tree)
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, RecursionError) as error:
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
    names = PurePosixPath(member.name), PureWindowsPath(member.name)  # to Windows, `C:` is a disk and `\` a slash
    is_plain = member.isdir() or (member.isreg() and not member.issparse())  # of a sparse file, the size is only stated
    leaves = any(name.anchor or ".." in name.parts for name in names)
    if leaves or not is_plain:
        kind = {tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link"}.get(member.type, "member")
        raise ValueError(f"the archive must hold only files and folders of its own, got the {kind} {member.name!r}")


def _check_hash(archive: Path, sha256: str | None) -> None:
    """Say the hash of the archive in the log, and refuse another one than wanted."""
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    logger.info("SHA-256 of %s: %s", archive.name, digest)
    if sha256 is not None and digest != sha256:
        raise ValueError(f"{archive} must have the SHA-256 {sha256}, got {digest}; delete it to fetch it again")


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
