"""Connections that end early, servers in trouble, and runs that are killed."""

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.archives import ARCHIVE, NEWER, PART, STAMP, TREE, WHOLE, assert_unpacked, names_in
from tests.support.downloads import fetch, newer, whole
from tests.support.servers import serving

EXAMPLES = Path(__file__).parents[4] / "examples"


@pytest.mark.parametrize("sent", [1, 1000, 65536, len(WHOLE) - 1])
def test_a_cut_connection_is_resumed(tmp_path, sent):
    with serving(whole(sent=sent), whole()) as server:
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert server.requests == [(None, None), (f"bytes={sent}-", '"1"')]


def test_attempts_and_later_runs_keep_the_received_bytes(tmp_path):
    with serving(whole(sent=1000)) as server:
        with pytest.raises(ConnectionError, match=rf"{server.url} failed 3 times, .* got 3000 of {len(WHOLE)} bytes"):
            fetch(tmp_path, server, ATTEMPTS=3)
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
            fetch(tmp_path, server, ATTEMPTS=4, PAUSE=0.02)
    assert len(server.requests) == 4
    assert time.monotonic() - start >= 0.02 + 0.04 + 0.08


def test_a_stalled_connection_is_dropped_and_resumed(tmp_path):
    with serving(whole(sent=140_000, stalls=True), whole()) as server:
        fetch(tmp_path, server, TIMEOUT=0.5)
    assert_unpacked(tmp_path)
    assert server.requests == [(None, None), (f"bytes={2 * 65536}-", '"1"')]


def test_a_server_that_never_answers(tmp_path):
    with serving(whole(sent=0, stalls=True)) as server, pytest.raises(ConnectionError, match=r"2 times, .*timed out"):
        fetch(tmp_path, server, TIMEOUT=0.1, ATTEMPTS=2)
    assert not names_in(tmp_path) & {ARCHIVE, TREE}


def test_a_server_that_does_not_listen(tmp_path):
    with serving(whole()) as server:
        pass
    with pytest.raises(ConnectionError, match=r"failed 2 times, .*refused"):
        fetch(tmp_path, server, ATTEMPTS=2)
    assert names_in(tmp_path) == set()


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


def test_a_run_that_ended_before_the_renaming(tmp_path):
    with serving(whole(sent=1000)) as server:
        with pytest.raises(ConnectionError):
            fetch(tmp_path, server, ATTEMPTS=1)
        (tmp_path / PART).write_bytes(WHOLE)
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert len(server.requests) == 1


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


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(faults=FAULTS)
def test_versions_are_never_mixed_after_any_faults(tmp_path_factory, faults):
    directory = tmp_path_factory.mktemp("faults")
    with serving(*(replace(BAD[name], sent=sent) for name, sent in faults), whole()) as server:
        fetch(directory, server, ATTEMPTS=7, PAUSE=0.0)
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
