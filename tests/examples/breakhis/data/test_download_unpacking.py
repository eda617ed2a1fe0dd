import copy
import gzip
import re
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from tests.support.archives import ARCHIVE, IMAGES, TREE, WHOLE, assert_unpacked, make_member, names_in, pack
from tests.support.downloads import download_with


def unpack(directory: Path, archive: bytes, **constants: int) -> Path:
    """Unpack an archive that is already in the directory; no server is used."""
    (directory / ARCHIVE).write_bytes(archive)
    limits = {"NUM_IMAGES": 3, "MAX_BYTES": 10**9, "MAX_HEADERS": 10**7}
    return download_with(directory, ARCHIVE_URL="http://127.0.0.1:9", **limits | constants)


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (make_member("../evil"), "member '../evil'"),
        (make_member("BreaKHis_v1/../../evil"), "member 'BreaKHis_v1/../../evil'"),
        (make_member("BreaKHis_v1/../inside"), "member 'BreaKHis_v1/../inside'"),
        (make_member("/{outside}/evil"), "member '/{outside}/evil'"),
        (make_member("link", tarfile.SYMTYPE, "BreaKHis_v1"), "symbolic link 'link'"),
        (make_member("link", tarfile.SYMTYPE, "/"), "symbolic link 'link'"),
        (make_member("link", tarfile.LNKTYPE, "BreaKHis_v1/slides/0.png"), "hard link 'link'"),
        (make_member("null", tarfile.CHRTYPE), "member 'null'"),
        (make_member("disk", tarfile.BLKTYPE), "member 'disk'"),
        (make_member("pipe", tarfile.FIFOTYPE), "member 'pipe'"),
        (make_member("..\\..\\evil"), r"member '..\\..\\evil'"),  # leaves the folder on Windows
        (make_member("C:/evil"), "member 'C:/evil'"),
        (make_member("C:evil"), "member 'C:evil'"),
        (make_member("\x1b[2J/../evil"), r"member '\x1b[2J/../evil'"),
    ],
)
def test_dangerous_members_are_refused_by_name(tmp_path, evil, name):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    folder = str(outside).strip("/")
    evil = copy.copy(evil)
    evil.name = evil.name.format(outside=folder)
    name = re.escape(name.format(outside=folder))
    with pytest.raises(ValueError, match=rf"must hold only files and folders of its own, got the {name}$"):
        unpack(inside, pack(IMAGES, evil))
    assert names_in(inside) == {ARCHIVE}
    assert names_in(tmp_path) == {"inside", "outside"}
    assert names_in(outside) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "bomb",
    [
        {"bomb.png": bytes(2_000_000)},
        {f"{i}.png": b"" for i in range(2000)},
    ],
    ids=["one large", "many empty"],
)
def test_a_bomb_is_refused(tmp_path, bomb):
    archive = pack(bomb)
    assert len(archive) < 50_000
    with pytest.raises(ValueError, match="must unpack to at most 1000000 bytes, got more"):
        unpack(tmp_path, archive, MAX_BYTES=1_000_000, NUM_IMAGES=len(bomb))
    assert names_in(tmp_path) == {ARCHIVE}
    unpack(tmp_path, archive, NUM_IMAGES=len(bomb))
    assert names_in(tmp_path) == {ARCHIVE, TREE}


def header(kind: bytes, size: int) -> bytes:
    """Make the block of a tar file that announces a member."""
    member = make_member("BreaKHis_v1", kind)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


KINDS = [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_header_is_refused_before_it_is_read(tmp_path, kind):
    content = 40_000_000
    archive = gzip.compress(header(kind, content) + bytes(content), compresslevel=1, mtime=0)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"{ARCHIVE} must have at most 10000000 bytes of headers, got more$"):
            unpack(tmp_path, archive)
        assert tracemalloc.get_traced_memory()[1] < content / 2
    finally:
        tracemalloc.stop()
    assert names_in(tmp_path) == {ARCHIVE}


def test_many_headers_are_refused(tmp_path):
    keys = [b"29 comment%06d=aaaaaaaaaaa\n" % i for i in range(3000)]
    records = [header(tarfile.XGLTYPE, 29) + key.ljust(512, b"\0") for key in keys]
    archive = gzip.compress(b"".join(records) + bytes(1024), mtime=0)
    with pytest.raises(ValueError, match=r"must have at most 100000 bytes of headers, got more"):
        unpack(tmp_path, archive, MAX_HEADERS=100_000)
    # Within the limit, tarfile calls itself for each.
    with pytest.raises(ValueError, match=r"must be a whole archive, got: maximum recursion depth exceeded"):
        unpack(tmp_path, archive)
    assert names_in(tmp_path) == {ARCHIVE}


def test_the_content_of_files_is_no_header(tmp_path):
    assert sum(map(len, IMAGES.values())) > 200_000
    unpack(tmp_path, WHOLE, MAX_HEADERS=20_000)
    assert_unpacked(tmp_path)


def test_a_file_with_holes_is_refused(tmp_path):
    """Its stated size costs nothing in the archive, and would be allowed to be read as headers."""
    block = bytearray(header(tarfile.GNUTYPE_SPARSE, 0))
    block[386:410] = b"%011o\0%011o\0" % (0, 0)  # one part of no bytes
    block[483:495] = b"%011o\0" % 10**8  # size with the holes
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    with pytest.raises(ValueError, match="must hold only files and folders of its own, got the member 'BreaKHis_v1'"):
        unpack(tmp_path, gzip.compress(bytes(block) + bytes(1024)))


def test_more_than_padding_after_the_end_is_refused(tmp_path):
    longer = gzip.compress(gzip.decompress(WHOLE) + bytes(12_000_000), mtime=0)
    with pytest.raises(ValueError, match="bytes of headers, got more"):
        unpack(tmp_path, longer)
    unpack(tmp_path, gzip.compress(gzip.decompress(WHOLE) + bytes(20_000), mtime=0))


def damaged(index: int) -> bytes:
    """Flip one bit of the archive."""
    return WHOLE[:index] + bytes([WHOLE[index] ^ 1]) + WHOLE[index + 1 :]


def with_an_invalid_block() -> bytes:
    """Pack the archive as two gzip streams; the second one begins with deflate's reserved block type."""
    tar = gzip.decompress(WHOLE)
    first, second = (gzip.compress(half, mtime=0) for half in (tar[:100_000], tar[100_000:]))
    return first + second[:10] + b"\x07" + second[11:]


@pytest.mark.parametrize(
    "archive",
    [
        WHOLE[:-1],
        WHOLE[:-8],
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:20],
        damaged(len(WHOLE) - 8),
        damaged(len(WHOLE) - 4),
        damaged(len(WHOLE) // 2),
        with_an_invalid_block(),
        WHOLE + b"more",
        gzip.compress(b"no tar"),
        b"\x1f\x8b",
        b"no gzip",
        b"",
    ],
    ids=["-1", "-8", "half", "20", "CRC", "length", "middle", "block", "more", "no tar", "magic", "no gzip", "empty"],
)
def test_damaged_archives_are_refused(tmp_path, archive):
    with pytest.raises(
        ValueError, match=r"BreaKHis_v1\.tar\.gz must be a whole archive, got: .+; delete it to fetch it"
    ):
        unpack(tmp_path, archive)
    assert names_in(tmp_path) == {ARCHIVE}


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"{ARCHIVE} must hold 4 images, got 3; delete it to make it anew"):
        unpack(tmp_path, WHOLE, NUM_IMAGES=4)
    assert names_in(tmp_path) == {ARCHIVE}
    unpack(tmp_path, WHOLE)
    (tmp_path / TREE / next(iter(IMAGES))).unlink()
    with pytest.raises(ValueError, match=rf"{TREE} must hold 3 images, got 2; delete it to make it anew"):
        unpack(tmp_path, WHOLE)


def test_files_unpacked_by_a_killed_run_are_dropped(tmp_path):
    old = tmp_path / ".BreaKHis_v1.unpacking" / "BreaKHis_v1" / "old.png"
    old.parent.mkdir(parents=True)
    old.touch()
    unpack(tmp_path, WHOLE)
    assert_unpacked(tmp_path)
