import hashlib
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples.archive_server import (
    ARCHIVE,
    EXAMPLES,
    NEWER,
    PART,
    STAMP,
    TREE,
    WHOLE,
    Answer,
    assert_done,
    fetch,
    listing,
    serving,
)


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
