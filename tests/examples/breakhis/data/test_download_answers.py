"""What a server says about the file: its version, its size, the range that it sends."""

import shutil
from dataclasses import replace

import pytest

from tests.support.archives import ARCHIVE, NEWER, PART, STAMP, TREE, WHOLE, assert_unpacked, names_in
from tests.support.downloads import fetch, newer, whole
from tests.support.servers import Answer, serving


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


def test_a_part_longer_than_the_file_starts_over(tmp_path):
    with serving(whole(sent=100_000), whole(status=416), whole()) as server:
        fetch(tmp_path, server)
    assert_unpacked(tmp_path)
    assert server.requests[2:] == [(None, None)]


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
