import hashlib
import io
import logging
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from email import message_from_string
from functools import partial
from pathlib import Path
from urllib.response import addinfourl

import pytest
from breakhis.data.download import ARCHIVE_URL, download
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.archives import ARCHIVE, NEWER, PART, STAMP, TREE, WHOLE, assert_unpacked, names_in
from tests.support.servers import Answer, Server, serving

EXAMPLES = Path(__file__).parents[4] / "examples"
whole = partial(Answer, WHOLE)
newer = partial(Answer, NEWER, etag='"2"')


def fetch(
    directory: Path,
    server: Server,
    attempts: int = 4,
    pause: float = 0.001,
    timeout: float = 10.0,
    sha256: str | None = None,
) -> Path:
    """Download the three images of a server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("breakhis.data.download.ARCHIVE_URL", server.url)
        patch.setattr("breakhis.data.download.NUM_IMAGES", 3)
        patch.setattr("breakhis.data.download.ATTEMPTS", attempts)
        patch.setattr("breakhis.data.download.PAUSE", pause)
        patch.setattr("breakhis.data.download.TIMEOUT", timeout)
        return download(directory, sha256)


def test_a_good_server(tmp_path, capsys):
    with serving(whole()) as server:
        assert fetch(tmp_path / "new" / "data", server) == tmp_path / "new" / "data" / TREE
    assert_unpacked(tmp_path / "new" / "data")
    assert server.requests == [(None, None)]
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize("sent", [1, 1000, 65536, len(WHOLE) - 1])
def test_a_cut_connection_is_resumed(tmp_path, sent):
    with serving(whole(sent=sent), whole()) as server:
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert server.requests == [(None, None), (f"bytes={sent}-", '"1"')]


def test_attempts_and_later_runs_keep_the_received_bytes(tmp_path):
    with serving(whole(sent=1000)) as server:
        with pytest.raises(ConnectionError, match=rf"{server.url} failed 3 times, .* got 3000 of {len(WHOLE)} bytes"):
            fetch(tmp_path, server, attempts=3)
        assert names_in(tmp_path) == {PART, STAMP}
        assert (tmp_path / PART).read_bytes() == WHOLE[:3000]
        server.answers = [whole()]
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert server.requests[3:] == [("bytes=3000-", '"1"')]


def test_pauses_double(tmp_path):
    with serving(whole(status=500)) as server:
        start = time.monotonic()
        with pytest.raises(ConnectionError):
            fetch(tmp_path, server, attempts=4, pause=0.02)
    assert len(server.requests) == 4
    assert time.monotonic() - start >= 0.02 + 0.04 + 0.08


def test_a_stalled_connection_is_dropped_and_resumed(tmp_path):
    with serving(whole(sent=140_000, stalls=True), whole()) as server:
        fetch(tmp_path, server, timeout=0.5)
    assert_unpacked(tmp_path)
    assert server.requests == [(None, None), (f"bytes={2 * 65536}-", '"1"')]


def test_a_server_that_never_answers(tmp_path):
    with serving(whole(sent=0, stalls=True)) as server, pytest.raises(ConnectionError, match=r"2 times, .*timed out"):
        fetch(tmp_path, server, timeout=0.1, attempts=2)
    assert not names_in(tmp_path) & {ARCHIVE, TREE}


def test_a_server_that_does_not_listen(tmp_path):
    with serving(whole()) as server:
        pass
    with pytest.raises(ConnectionError, match=r"failed 2 times, .*refused"):
        fetch(tmp_path, server, attempts=2)
    assert names_in(tmp_path) == set()


def test_a_server_without_ranges_starts_over(tmp_path):
    with serving(whole(sent=100_000, ranges=False), whole(ranges=False)) as server:
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert server.requests == [(None, None), ("bytes=100000-", '"1"')]


def test_a_file_that_changes_during_the_download_starts_over(tmp_path):
    with serving(whole(sent=100_000), newer(sent=5000), newer()) as server:
        fetch(tmp_path, server)
    assert_unpacked(tmp_path, NEWER)
    assert server.requests[1:] == [("bytes=100000-", '"1"'), ("bytes=5000-", '"2"')]


@pytest.mark.parametrize(
    ("etag", "date", "expected"),
    [
        ('"1"', "Tue, 24 Nov 2026 12:00:00 GMT", '"1"'),
        (None, "Tue, 24 Nov 2026 12:00:00 GMT", "Tue, 24 Nov 2026 12:00:00 GMT"),
        ('W/"1"', "Tue, 24 Nov 2026 12:00:00 GMT", "Tue, 24 Nov 2026 12:00:00 GMT"),
        ('W/"1"', None, None),  # nothing promises the same bytes, so the part is not continued
        (None, None, None),
    ],
)
def test_a_file_is_identified_by_a_strong_etag_or_a_date(tmp_path, etag, date, expected):
    answer = whole(etag=etag, date=date)
    with serving(replace(answer, sent=1000), answer) as server:
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert server.requests == [(None, None), (expected and "bytes=1000-", expected)]


def test_a_stamp_that_was_cut_short_is_harmless(tmp_path):
    for stamp in (b"", b"21", f"{len(WHOLE)}".encode(), f'{len(WHOLE)} "'.encode()):
        (tmp_path / PART).write_bytes(b"x" * 1000)
        (tmp_path / STAMP).write_bytes(stamp)
        with serving(whole()) as server:
            fetch(tmp_path, server)
        assert_unpacked(tmp_path)
        shutil.rmtree(tmp_path / TREE)
        (tmp_path / ARCHIVE).unlink()


@pytest.mark.parametrize(
    "content_range", ["bytes 999-{last}/{total}", "bytes 1000-{last}/99999999", "bytes */{total}", None]
)
def test_a_wrong_content_range_starts_over(tmp_path, content_range):
    wrong = content_range and content_range.format(last=len(WHOLE) - 1, total=len(WHOLE))
    with serving(whole(sent=1000), whole(headers=(("Content-Range", wrong),)), whole()) as server:
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert server.requests == [(None, None), ("bytes=1000-", '"1"'), (None, None)]


def test_a_rest_that_is_too_long_starts_over(tmp_path):
    longer = WHOLE + bytes(10)
    wrong_answer = Answer(longer, headers=(("Content-Range", f"bytes 1000-{len(WHOLE) - 1}/{len(WHOLE)}"),))
    with serving(whole(sent=1000), wrong_answer, whole()) as server:
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert server.requests[2] == (None, None)


def test_more_announced_than_sent(tmp_path):
    wrong_answer = whole(headers=(("Content-Length", str(len(WHOLE) + 1)),), ranges=False)
    with serving(wrong_answer) as server:
        with pytest.raises(ConnectionError, match=f"got {len(WHOLE)} of {len(WHOLE) + 1} bytes"):
            fetch(tmp_path, server)
        assert names_in(tmp_path) == {PART, STAMP}
        server.answers = [replace(wrong_answer, headers=())]
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)


def test_less_announced_than_sent(tmp_path):
    wrong_answer = whole(headers=(("Content-Length", str(len(WHOLE) - 1)),))
    with (
        serving(wrong_answer) as server,
        pytest.raises(ValueError, match=rf"{ARCHIVE} must be a whole archive, got: .*; delete"),
    ):
        fetch(tmp_path, server)
    assert names_in(tmp_path) == {ARCHIVE}


@pytest.mark.parametrize("length", [None, "0", "many"])
def test_no_size_announced(tmp_path, length):
    answer = whole(headers=(("Content-Length", length),))
    with serving(answer) as server, pytest.raises(ValueError, match=rf"{server.url} must announce its size, got none"):
        fetch(tmp_path, server)
    assert names_in(tmp_path) == set()
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_a_refusal_is_final(tmp_path, status):
    refusal = rf"^http://127.0.0.1:\d+/archive.tar.gz answered {status} \w+"
    with serving(whole(status=status), whole()) as server, pytest.raises(ConnectionError, match=refusal):
        fetch(tmp_path, server)
    assert len(server.requests) == 1
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_server_in_trouble_is_asked_again(tmp_path, status, caplog):
    with serving(whole(sent=1000), whole(status=status), whole()) as server:
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert server.requests[1:] == [("bytes=1000-", '"1"'), ("bytes=1000-", '"1"')]
    assert caplog.messages == [
        f"attempt 1 of 4 failed: got 1000 of {len(WHOLE)} bytes",
        f"attempt 2 of 4 failed: HTTP Error {status}: {caplog.messages[1].rpartition(': ')[2]}",
    ]


def test_a_part_longer_than_the_file_starts_over(tmp_path):
    with serving(whole(sent=100_000), whole(status=416), whole()) as server:
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert server.requests[2:] == [(None, None)]


def test_a_run_that_ended_before_the_renaming(tmp_path):
    with serving(whole(sent=1000)) as server:
        with pytest.raises(ConnectionError):
            fetch(tmp_path, server, attempts=1)
        (tmp_path / PART).write_bytes(WHOLE)
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize("headers", [(("Content-Type", "text/html"),), (("Content-Length", None),)])
def test_a_login_page_is_refused_and_costs_nothing(tmp_path, headers):
    page = Answer(b"<!DOCTYPE html><title>Log in</title>", etag=None, headers=headers)
    with serving(whole(sent=1000), page) as server:
        with pytest.raises(
            ValueError, match=rf"{server.url} must be a gzip file, got .*: does this network want you to"
        ):
            fetch(tmp_path, server)
        assert len(server.requests) == 2
        assert (tmp_path / PART).read_bytes() == WHOLE[:1000]
        server.answers = [whole()]
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert server.requests[2] == ("bytes=1000-", '"1"')


def test_too_little_space_is_reported_before_anything_is_written(tmp_path):
    answer, refusal = (
        whole(headers=(("Content-Length", str(10**18)),)),
        r"must have 1862645149\.2 GiB .*, got \d+\.\d GiB",
    )
    with serving(answer) as server, pytest.raises(OSError, match=refusal):
        fetch(tmp_path, server)
    assert names_in(tmp_path) == set()
    assert len(server.requests) == 1


def test_existing_files_are_not_fetched_or_unpacked_again(tmp_path):
    with serving(whole()) as server:
        fetch(tmp_path, server)
        shutil.rmtree(tmp_path / TREE)
        fetch(tmp_path, server)
        assert_unpacked(tmp_path)
        (tmp_path / ARCHIVE).unlink()
        assert fetch(tmp_path, server) == tmp_path / TREE
    assert names_in(tmp_path) == {TREE}
    assert len(server.requests) == 1


def test_the_hash_is_said_in_the_log(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="breakhis"), serving(whole()) as server:
        fetch(tmp_path, server)
    assert caplog.messages == [f"SHA-256 of {ARCHIVE}: {hashlib.sha256(WHOLE).hexdigest()}"]


def test_another_archive_than_wanted_is_not_unpacked(tmp_path):
    good, bad = (hashlib.sha256(archive).hexdigest() for archive in (WHOLE, NEWER))
    refusal = rf"{ARCHIVE} must have the SHA-256 {bad}, got {good}; delete it to fetch it again"
    with serving(whole()) as server:
        with pytest.raises(ValueError, match=refusal):
            fetch(tmp_path, server, sha256=bad)
        assert names_in(tmp_path) == {ARCHIVE}
        fetch(tmp_path, server, sha256=good)
        assert_unpacked(tmp_path)
        with pytest.raises(ValueError, match=refusal):  # an unpacked archive too
            fetch(tmp_path, server, sha256=bad)
        fetch(tmp_path, server, sha256=good)
        (tmp_path / ARCHIVE).unlink()
        with pytest.raises(ValueError, match=rf"{TREE} must lie next to its archive, {ARCHIVE}, for the check"):
            fetch(tmp_path, server, sha256=good)
    assert len(server.requests) == 1


def test_the_archive_comes_over_an_encrypted_connection():
    assert ARCHIVE_URL.startswith("https://")


@pytest.mark.parametrize("target", ["http://127.0.0.1/x", "HTTP://127.0.0.1/x", "ftp://127.0.0.1/x"])
def test_a_redirection_away_from_https_is_refused(monkeypatch, target, tmp_path):
    answers = []

    def answer(handler, request):
        """Redirect the first request; no network is used."""
        answers.append(request.full_url)
        response = addinfourl(io.BytesIO(), message_from_string(f"Location: {target}\n\n"), request.full_url, 302)
        response.msg = "Found"
        return response

    monkeypatch.setattr("urllib.request.HTTPSHandler.https_open", answer)
    monkeypatch.setattr("breakhis.data.download.ARCHIVE_URL", "https://localhost/archive.tar.gz")
    with pytest.raises(ValueError, match=rf"(?i)localhost/archive.tar.gz must not lead away .*, got .* '{target}'"):
        download(tmp_path)
    assert answers == ["https://localhost/archive.tar.gz"]


def test_a_redirection_within_https_is_followed(monkeypatch, tmp_path):
    def answer(handler, request):
        headers = f"Location: https://localhost/new\nContent-Length: {len(WHOLE)}\n\n"
        code = 200 if request.full_url.endswith("/new") else 301
        response = addinfourl(io.BytesIO(WHOLE), message_from_string(headers), request.full_url, code)
        response.msg, response.length = "", len(WHOLE)
        return response

    monkeypatch.setattr("urllib.request.HTTPSHandler.https_open", answer)
    monkeypatch.setattr("breakhis.data.download.ARCHIVE_URL", "https://localhost/archive.tar.gz")
    monkeypatch.setattr("breakhis.data.download.NUM_IMAGES", 3)
    download(tmp_path)
    assert_unpacked(tmp_path)


BAD = {
    "cut": whole(),
    "no ranges": whole(ranges=False),
    "no version": whole(etag=None),
    "changed": newer(),
    "wrong range": whole(headers=(("Content-Range", "bytes 7-8/9"),)),
    "416": whole(status=416),
    "500": whole(status=500),
}
FAULTS = st.lists(st.tuples(st.sampled_from(sorted(BAD)), st.integers(0, len(NEWER) - 1)), max_size=6)


@settings(deadline=None, max_examples=60)
@given(faults=FAULTS)
def test_versions_are_never_mixed_after_any_faults(tmp_path_factory, faults):
    directory = tmp_path_factory.mktemp("faults")
    with serving(*(replace(BAD[name], sent=sent) for name, sent in faults), whole()) as server:
        fetch(directory, server, attempts=7, pause=0.0)
    # The changed file may have arrived completely, over several attempts.
    assert_unpacked(directory, WHOLE if (directory / ARCHIVE).read_bytes() == WHOLE else NEWER)
    shutil.rmtree(directory)


def test_the_next_run_goes_on_where_a_killed_one_stopped(tmp_path):
    with serving(whole(sent=140_000, stalls=True), whole()) as server:
        code = """
import sys
from pathlib import Path
from breakhis.data import download
download.ARCHIVE_URL = sys.argv[2]
download.download(Path(sys.argv[1]))
"""
        command = [sys.executable, "-c", code, str(tmp_path), server.url]
        with subprocess.Popen(command, cwd=EXAMPLES, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 30
            while not ((tmp_path / PART).exists() and (tmp_path / PART).stat().st_size >= 2 * 65536):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert names_in(tmp_path) == {PART, STAMP}
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert server.requests[1] == (f"bytes={2 * 65536}-", '"1"')
