import copy
import gzip
import re
import tarfile
from pathlib import Path

import pytest
from breakhis.download import download

from tests.examples.archive_server import ARCHIVE, IMAGES, TREE, WHOLE, assert_done, listing, member, pack


def unpack(directory: Path, archive: bytes, **options) -> Path:
    """Unpacks an archive that is there already; no server is asked."""
    (directory / ARCHIVE).write_bytes(archive)
    return download(directory, "http://127.0.0.1:9", **({"num_images": 3, "progress": False} | options))


@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (member("../evil"), "member '../evil'"),
        (member("BreaKHis_v1/../../evil"), "member 'BreaKHis_v1/../../evil'"),
        (member("BreaKHis_v1/../inside"), "member 'BreaKHis_v1/../inside'"),
        (member("/{outside}/evil"), "member '/{outside}/evil'"),
        (member("link", tarfile.SYMTYPE, "BreaKHis_v1"), "symbolic link 'link'"),
        (member("link", tarfile.SYMTYPE, "/"), "symbolic link 'link'"),
        (member("link", tarfile.LNKTYPE, "BreaKHis_v1/slides/0.png"), "hard link 'link'"),
        (member("null", tarfile.CHRTYPE), "member 'null'"),
        (member("disk", tarfile.BLKTYPE), "member 'disk'"),
        (member("pipe", tarfile.FIFOTYPE), "member 'pipe'"),
    ],
)
def test_members_that_could_do_harm_are_refused_by_name(tmp_path, evil, named):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    place = str(outside).strip("/")
    evil = copy.copy(evil)
    evil.name = evil.name.format(outside=place)
    named = re.escape(named.format(outside=place))
    with pytest.raises(ValueError, match=rf"must hold only files and folders of its own, got the {named}$"):
        unpack(inside, pack(IMAGES, evil))
    assert listing(inside) == {ARCHIVE}
    assert listing(tmp_path) == {"inside", "outside"}
    assert listing(outside) == set()


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
        unpack(tmp_path, archive, max_bytes=1_000_000, num_images=len(bomb))
    assert listing(tmp_path) == {ARCHIVE}
    unpack(tmp_path, archive, num_images=len(bomb))
    assert listing(tmp_path) == {ARCHIVE, TREE}


def damaged(place: int) -> bytes:
    return WHOLE[:place] + bytes([WHOLE[place] ^ 1]) + WHOLE[place + 1 :]


def with_an_invalid_block() -> bytes:
    """The archive as two gzip streams, of which the second begins with deflate's reserved block type."""
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
    assert listing(tmp_path) == {ARCHIVE}


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"{ARCHIVE} must hold 4 images, got 3; delete it to make it anew"):
        unpack(tmp_path, WHOLE, num_images=4)
    assert listing(tmp_path) == {ARCHIVE}
    unpack(tmp_path, WHOLE)
    (tmp_path / TREE / next(iter(IMAGES))).unlink()
    with pytest.raises(ValueError, match=rf"{TREE} must hold 3 images, got 2; delete it to make it anew"):
        unpack(tmp_path, WHOLE)


def test_what_a_killed_run_had_unpacked_is_dropped(tmp_path):
    old = tmp_path / ".BreaKHis_v1.unpacking" / "BreaKHis_v1" / "old.png"
    old.parent.mkdir(parents=True)
    old.touch()
    unpack(tmp_path, WHOLE)
    assert_done(tmp_path)
