"""A local web server with faults: it can cut a connection, stall, and send wrong headers."""

import contextlib
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """The server's answer to one request; without changes it is that of a correct server."""

    body: bytes
    """The file."""
    etag: str | None = '"1"'
    """Version of the file; None: no such header."""
    date: str | None = None
    """Date of the file; None: no such header."""
    status: int | None = None
    """Answer with this error instead of the file."""
    ranges: bool = True
    """Whether the server follows the header Range."""
    sent: int | None = None
    """Close the connection after this number of bytes of the body."""
    stalls: bool = False
    """Send nothing more instead of closing the connection."""
    headers: tuple[tuple[str, str | None], ...] = ()
    """Wrong headers instead of the right ones; None: no such header."""


class Server(ThreadingHTTPServer):
    """Gives the answers one after the other, then the last one again, and keeps Range and If-Range of each request."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)  # port 0: the system chooses a free one
        self.answers, self.requests, self.over = list(answers), [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/archive.tar.gz"

    def handle_error(self, request, client_address) -> None:
        """Print nothing: clients may close a connection."""


class Handler(BaseHTTPRequestHandler):
    """Sends one answer."""

    server: Server

    def do_GET(self) -> None:
        requested, version = self.headers["Range"], self.headers["If-Range"]
        self.server.requests.append((requested, version))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer.status is not None:
            self.send_error(answer.status)
            return
        total, start = len(answer.body), 0
        if requested and answer.ranges and version in (answer.etag, answer.date):
            start = int(re.fullmatch(r"bytes=(\d+)-", requested)[1])
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
        """Print nothing."""


@contextlib.contextmanager
def serving(*answers: Answer) -> Iterator[Server]:
    """Run a server in a thread."""
    with Server(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
