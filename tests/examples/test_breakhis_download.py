import contextlib
import copy
import gzip
import hashlib
import io
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from breakhis.download import download
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = Path(__file__).parents[2] / "examples"
PART, STAMP, ARCHIVE, TREE = (
    "BreaKHis_v1.tar.gz.part",
    "BreaKHis_v1.tar.gz.part.stamp",
    "BreaKHis_v1.tar.gz",
    "BreaKHis_v1",
)

RANDOM = random.Random(0)
IMAGES = {f"BreaKHis_v1/slides/{i}.png": RANDOM.randbytes(70_000) for i in range(3)}  # do not compress


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def pack(files: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(member("BreaKHis_v1", tarfile.DIRTYPE))
        for name, content in files.items():
            info = member(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for other in others:
            tar.addfile(other)
    return buffer.getvalue()


WHOLE = pack(IMAGES)
NEWER = pack({name: content[::-1] for name, content in IMAGES.items()})


@dataclass(frozen=True)
class Answer:
    """What the server does with one request; by default it is a good server.

    Attributes:
        body: The file it has.
        etag: Its version; None leaves the header out.
        date: Its date; None leaves the header out.
        status: Answers with this and no file.
        ranges: Whether it heeds Range.
        sent: Closes the connection after so many bytes of the body.
        stalls: Falls silent where it would close.
        headers: Instead of the right ones; None leaves one out.
    """

    body: bytes = WHOLE
    etag: str | None = '"1"'
    date: str | None = None
    status: int | None = None
    ranges: bool = True
    sent: int | None = None
    stalls: bool = False
    headers: tuple[tuple[str, str | None], ...] = ()


class Server(ThreadingHTTPServer):
    """Gives the answers in turn, the last for good, and keeps each request's Range and If-Range."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.over = list(answers), [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/archive.tar.gz"

    def handle_error(self, request, client_address) -> None:
        """Says nothing: a client that hangs up is no news here."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked, version = self.headers["Range"], self.headers["If-Range"]
        self.server.requests.append((asked, version))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer.status is not None:
            self.send_error(answer.status)
            return
        total, start = len(answer.body), 0
        if asked and answer.ranges and version in (answer.etag, answer.date):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= total:
                self.send_error(416)
                return
        headers = {"Content-Length": str(total - start), "Content-Type": "application/x-gzip"}
        headers |= {"ETag": answer.etag, "Last-Modified": answer.date}
        if start:
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self.send_response(206 if start else 200)
        for name, value in (headers | dict(answer.headers)).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[start:] if answer.sent is None else answer.body[start : start + answer.sent])
        if answer.stalls:
            self.wfile.flush()
            self.server.over.wait(30)

    def log_message(self, *args) -> None:
        """Says nothing."""


@contextlib.contextmanager
def serving(*answers: Answer) -> Iterator[Server]:
    with Server(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def fetch(directory: Path, server: Server, **options) -> Path:
    defaults = {"num_images": 3, "attempts": 4, "pause": 0.001, "timeout": 10.0, "progress": False}
    return download(directory, server.url, **(defaults | options))


def listing(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def assert_done(directory: Path, archive: bytes = WHOLE) -> None:
    """The archive and its tree are there, byte for byte, and nothing else."""
    assert listing(directory) == {ARCHIVE, TREE}
    assert (directory / ARCHIVE).read_bytes() == archive
    files = {path.relative_to(directory / TREE).as_posix(): path for path in (directory / TREE).rglob("*.png")}
    images = IMAGES if archive == WHOLE else {name: content[::-1] for name, content in IMAGES.items()}
    assert {name: path.read_bytes() for name, path in files.items()} == images


def test_a_good_server(tmp_path, capsys):
    with serving(Answer()) as server:
        assert fetch(tmp_path / "new" / "data", server, progress=True) == tmp_path / "new" / "data" / TREE
    assert_done(tmp_path / "new" / "data")
    assert server.requests == [(None, None)]
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize("sent", [1, 1000, 65536, len(WHOLE) - 1])
def test_a_cut_connection_is_resumed(tmp_path, sent):
    with serving(Answer(sent=sent), Answer()) as server:
        fetch(tmp_path, server)
    assert_done(tmp_path)
    assert server.requests == [(None, None), (f"bytes={sent}-", '"1"')]


def test_each_attempt_keeps_what_it_got_and_so_does_a_later_run(tmp_path):
    with serving(Answer(sent=1000)) as server:
        with pytest.raises(ConnectionError, match=rf"{server.url} failed 3 times, .* got 3000 of {len(WHOLE)} bytes"):
            fetch(tmp_path, server, attempts=3)
        assert listing(tmp_path) == {PART, STAMP}
        assert (tmp_path / PART).read_bytes() == WHOLE[:3000]
        server.answers = [Answer()]
        fetch(tmp_path, server)
    assert_done(tmp_path)
    assert server.requests[3:] == [("bytes=3000-", '"1"')]


def test_pauses_double(tmp_path):
    with serving(Answer(status=500)) as server:
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            fetch(tmp_path, server, attempts=4, pause=0.02)
    assert len(server.requests) == 4
    assert time.monotonic() - began >= 0.02 + 0.04 + 0.08


def test_a_stalled_connection_is_dropped_and_resumed(tmp_path):
    with serving(Answer(sent=140_000, stalls=True), Answer()) as server:
        fetch(tmp_path, server, timeout=0.5)
    assert_done(tmp_path)
    assert server.requests == [(None, None), (f"bytes={2 * 65536}-", '"1"')]


def test_a_server_that_never_answers(tmp_path):
    with serving(Answer(sent=0, stalls=True)) as server, pytest.raises(ConnectionError, match=r"2 times, .*timed out"):
        fetch(tmp_path, server, timeout=0.1, attempts=2)
    assert not listing(tmp_path) & {ARCHIVE, TREE}


def test_nobody_listens(tmp_path):
    with serving(Answer()) as server:
        pass
    with pytest.raises(ConnectionError, match=r"failed 2 times, .*refused"):
        fetch(tmp_path, server, attempts=2)
    assert listing(tmp_path) == set()


def test_a_server_without_ranges_starts_over(tmp_path):
    with serving(Answer(sent=100_000, ranges=False), Answer(ranges=False)) as server:
        fetch(tmp_path, server)
    assert_done(tmp_path)
    assert server.requests == [(None, None), ("bytes=100000-", '"1"')]


def test_a_file_that_changes_meanwhile_starts_over(tmp_path):
    with serving(Answer(sent=100_000), Answer(NEWER, etag='"2"', sent=5000), Answer(NEWER, etag='"2"')) as server:
        fetch(tmp_path, server)
    assert_done(tmp_path, NEWER)
    assert server.requests[1:] == [("bytes=100000-", '"1"'), ("bytes=5000-", '"2"')]


@pytest.mark.parametrize(
    ("etag", "date", "expected"),
    [
        ('"1"', "Tue, 24 Nov 2026 12:00:00 GMT", '"1"'),
        (None, "Tue, 24 Nov 2026 12:00:00 GMT", "Tue, 24 Nov 2026 12:00:00 GMT"),
        ('W/"1"', "Tue, 24 Nov 2026 12:00:00 GMT", "Tue, 24 Nov 2026 12:00:00 GMT"),
        ('W/"1"', None, None),  # nothing promises the same bytes, so they are not joined
        (None, None, None),
    ],
)
def test_what_identifies_the_file(tmp_path, etag, date, expected):
    answer = Answer(etag=etag, date=date)
    with serving(replace(answer, sent=1000), answer) as server:
        fetch(tmp_path, server)
    assert_done(tmp_path)
    assert server.requests == [(None, None), (expected and "bytes=1000-", expected)]


def test_a_stamp_that_was_cut_short_is_harmless(tmp_path):
    for stamp in (b"", b"21", f"{len(WHOLE)}".encode(), f'{len(WHOLE)} "'.encode()):
        (tmp_path / PART).write_bytes(b"x" * 1000)
        (tmp_path / STAMP).write_bytes(stamp)
        with serving(Answer()) as server:
            fetch(tmp_path, server)
        assert_done(tmp_path)
        shutil.rmtree(tmp_path / TREE)
        (tmp_path / ARCHIVE).unlink()


@pytest.mark.parametrize("told", ["bytes 999-{last}/{total}", "bytes 1000-{last}/99999999", "bytes */{total}", None])
def test_a_wrong_content_range_starts_over(tmp_path, told):
    told = told and told.format(last=len(WHOLE) - 1, total=len(WHOLE))
    with serving(Answer(sent=1000), Answer(headers=(("Content-Range", told),)), Answer()) as server:
        fetch(tmp_path, server)
    assert_done(tmp_path)
    assert server.requests == [(None, None), ("bytes=1000-", '"1"'), (None, None)]


def test_a_rest_that_is_too_long_starts_over(tmp_path):
    longer = WHOLE + bytes(10)
    lie = Answer(longer, headers=(("Content-Range", f"bytes 1000-{len(WHOLE) - 1}/{len(WHOLE)}"),))
    with serving(Answer(sent=1000), lie, Answer()) as server:
        fetch(tmp_path, server)
    assert_done(tmp_path)
    assert server.requests[2] == (None, None)


def test_more_announced_than_sent(tmp_path):
    lie = Answer(headers=(("Content-Length", str(len(WHOLE) + 1)),), ranges=False)
    with serving(lie) as server:
        with pytest.raises(ConnectionError, match=f"got {len(WHOLE)} of {len(WHOLE) + 1} bytes"):
            fetch(tmp_path, server)
        assert listing(tmp_path) == {PART, STAMP}
        server.answers = [replace(lie, headers=())]
        fetch(tmp_path, server)
    assert_done(tmp_path)


def test_less_announced_than_sent(tmp_path):
    lie = Answer(headers=(("Content-Length", str(len(WHOLE) - 1)),))
    with (
        serving(lie) as server,
        pytest.raises(ValueError, match=rf"{ARCHIVE} must be a whole archive, got: .*; delete"),
    ):
        fetch(tmp_path, server)
    assert listing(tmp_path) == {ARCHIVE}


@pytest.mark.parametrize("length", [None, "0", "many"])
def test_no_size_announced(tmp_path, length):
    answer = Answer(headers=(("Content-Length", length),))
    with serving(answer) as server, pytest.raises(ValueError, match=rf"{server.url} must announce its size, got none"):
        fetch(tmp_path, server)
    assert listing(tmp_path) == set()
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_a_refusal_is_final(tmp_path, status):
    refusal = rf"^http://127.0.0.1:\d+/archive.tar.gz answered {status} \w+"
    with serving(Answer(status=status), Answer()) as server, pytest.raises(ConnectionError, match=refusal):
        fetch(tmp_path, server)
    assert len(server.requests) == 1
    assert listing(tmp_path) == set()


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_server_in_trouble_is_asked_again(tmp_path, status, caplog):
    with serving(Answer(sent=1000), Answer(status=status), Answer()) as server:
        fetch(tmp_path, server)
    assert_done(tmp_path)
    assert server.requests[1:] == [("bytes=1000-", '"1"'), ("bytes=1000-", '"1"')]
    assert caplog.messages == [
        f"attempt 1 of 4 failed: got 1000 of {len(WHOLE)} bytes",
        f"attempt 2 of 4 failed: HTTP Error {status}: {caplog.messages[1].rpartition(': ')[2]}",
    ]


def test_a_part_longer_than_the_file_starts_over(tmp_path):
    with serving(Answer(sent=100_000), Answer(status=416), Answer()) as server:
        fetch(tmp_path, server)
    assert_done(tmp_path)
    assert server.requests[2:] == [(None, None)]


def test_a_run_that_ended_before_the_renaming(tmp_path):
    with serving(Answer(sent=1000)) as server:
        with pytest.raises(ConnectionError):
            fetch(tmp_path, server, attempts=1)
        (tmp_path / PART).write_bytes(WHOLE)
        fetch(tmp_path, server)
    assert_done(tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize("headers", [(("Content-Type", "text/html"),), (("Content-Length", None),)])
def test_a_login_page_is_refused_and_costs_nothing(tmp_path, headers):
    page = Answer(b"<!DOCTYPE html><title>Log in</title>", etag=None, headers=headers)
    with serving(Answer(sent=1000), page) as server:
        with pytest.raises(
            ValueError, match=rf"{server.url} must be a gzip file, got .*: does this network want you to"
        ):
            fetch(tmp_path, server)
        assert len(server.requests) == 2
        assert (tmp_path / PART).read_bytes() == WHOLE[:1000]
        server.answers = [Answer()]
        fetch(tmp_path, server)
    assert_done(tmp_path)
    assert server.requests[2] == ("bytes=1000-", '"1"')


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    answer, refusal = (
        Answer(headers=(("Content-Length", str(10**18)),)),
        r"must have 1862645149\.2 GiB .*, got \d+\.\d GiB",
    )
    with serving(answer) as server, pytest.raises(OSError, match=refusal):
        fetch(tmp_path, server)
    assert listing(tmp_path) == set()
    assert len(server.requests) == 1


def test_what_is_there_is_not_fetched_or_unpacked_again(tmp_path):
    with serving(Answer()) as server:
        fetch(tmp_path, server)
        shutil.rmtree(tmp_path / TREE)
        fetch(tmp_path, server)
        assert_done(tmp_path)
        (tmp_path / ARCHIVE).unlink()
        assert fetch(tmp_path, server) == tmp_path / TREE
    assert listing(tmp_path) == {TREE}
    assert len(server.requests) == 1


@pytest.mark.parametrize("change", [str, str.upper])
def test_a_digest_is_compared(tmp_path, change):
    with serving(Answer()) as server:
        with pytest.raises(ValueError, match=rf"{ARCHIVE} must have SHA-256 0000, got .*; delete it to fetch it again"):
            fetch(tmp_path, server, sha256="0000")
        assert listing(tmp_path) == {ARCHIVE}
        fetch(tmp_path, server, sha256=change(hashlib.sha256(WHOLE).hexdigest()))
    assert_done(tmp_path)


BAD = {
    "cut": Answer(),
    "no ranges": Answer(ranges=False),
    "no version": Answer(etag=None),
    "changed": Answer(NEWER, etag='"2"'),
    "wrong range": Answer(headers=(("Content-Range", "bytes 7-8/9"),)),
    "416": Answer(status=416),
    "500": Answer(status=500),
}
FAULTS = st.lists(st.tuples(st.sampled_from(sorted(BAD)), st.integers(0, len(NEWER) - 1)), max_size=6)


@settings(deadline=None, max_examples=60)
@given(faults=FAULTS)
def test_whatever_came_before_versions_are_never_mixed(tmp_path_factory, faults):
    directory = tmp_path_factory.mktemp("faults")
    with serving(*(replace(BAD[name], sent=sent) for name, sent in faults), Answer()) as server:
        fetch(directory, server, attempts=7, pause=0.0)
    # The changed file may have come in whole, bit by bit.
    assert_done(directory, WHOLE if (directory / ARCHIVE).read_bytes() == WHOLE else NEWER)
    shutil.rmtree(directory)


def test_a_killed_run_leaves_what_the_next_needs(tmp_path):
    with serving(Answer(sent=140_000, stalls=True), Answer()) as server:
        code = "import sys, pathlib, breakhis.download as d; d.download(pathlib.Path(sys.argv[1]), sys.argv[2])"
        call = [sys.executable, "-c", code, str(tmp_path), server.url]
        with subprocess.Popen(call, cwd=EXAMPLES, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 30
            while not ((tmp_path / PART).exists() and (tmp_path / PART).stat().st_size >= 2 * 65536):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert listing(tmp_path) == {PART, STAMP}
        fetch(tmp_path, server)
    assert_done(tmp_path)
    assert server.requests[1] == (f"bytes={2 * 65536}-", '"1"')


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
