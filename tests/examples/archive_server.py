"""A server of archives that cuts, stalls and lies, and what tests fetch from it."""

import contextlib
import gzip
import io
import random
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from breakhis.download import download

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
