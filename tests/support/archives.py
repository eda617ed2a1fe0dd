"""Small archives like that of BreakHis, and the files that fetching and unpacking one leaves."""

import gzip
import io
import random
import tarfile
from pathlib import Path

PART, STAMP, ARCHIVE, TREE = (
    "BreaKHis_v1.tar.gz.part",
    "BreaKHis_v1.tar.gz.part.stamp",
    "BreaKHis_v1.tar.gz",
    "BreaKHis_v1",
)
RANDOM = random.Random(0)
IMAGES = {f"BreaKHis_v1/slides/{i}.png": RANDOM.randbytes(70_000) for i in range(3)}  # noise, which does not compress


def make_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """Make a member of a tar file, of any kind."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def pack(files: dict[str, bytes], *members: tarfile.TarInfo) -> bytes:
    """Pack files and further members into a gzip'd tar file."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(make_member("BreaKHis_v1", tarfile.DIRTYPE))
        for name, content in files.items():
            member = make_member(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in members:
            tar.addfile(member)
    return buffer.getvalue()


WHOLE = pack(IMAGES)
NEWER = pack({name: content[::-1] for name, content in IMAGES.items()})


def names_in(directory: Path) -> set[str]:
    """Return the names in a directory."""
    return {path.name for path in directory.iterdir()}


def assert_unpacked(directory: Path, archive: bytes = WHOLE) -> None:
    """Check that a directory holds the archive and its tree, byte for byte, and nothing else."""
    assert names_in(directory) == {ARCHIVE, TREE}
    assert (directory / ARCHIVE).read_bytes() == archive
    files = {path.relative_to(directory / TREE).as_posix(): path for path in (directory / TREE).rglob("*.png")}
    images = IMAGES if archive == WHOLE else {name: content[::-1] for name, content in IMAGES.items()}
    assert {name: path.read_bytes() for name, path in files.items()} == images
