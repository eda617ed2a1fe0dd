"""What is fetched, kept, compared and reported."""

import hashlib
import io
import logging
import shutil
from email import message_from_string
from urllib.response import addinfourl

import pytest
from breakhis.data.download import ARCHIVE_URL

from tests.support.archives import ARCHIVE, NEWER, TREE, WHOLE, assert_unpacked, names_in
from tests.support.downloads import download_with, fetch, whole
from tests.support.servers import serving


def test_a_good_server(tmp_path, capsys):
    with serving(whole()) as server:
        assert fetch(tmp_path / "new" / "data", server) == tmp_path / "new" / "data" / TREE
    assert_unpacked(tmp_path / "new" / "data")
    assert server.requests == [(None, None)]
    assert capsys.readouterr().err == ""  # bars are for terminals


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
    with pytest.raises(ValueError, match=rf"(?i)localhost/archive.tar.gz must not lead away .*, got .* '{target}'"):
        download_with(tmp_path, ARCHIVE_URL="https://localhost/archive.tar.gz")
    assert answers == ["https://localhost/archive.tar.gz"]


def test_a_redirection_within_https_is_followed(monkeypatch, tmp_path):
    def answer(handler, request):
        headers = f"Location: https://localhost/new\nContent-Length: {len(WHOLE)}\n\n"
        code = 200 if request.full_url.endswith("/new") else 301
        response = addinfourl(io.BytesIO(WHOLE), message_from_string(headers), request.full_url, code)
        response.msg, response.length = "", len(WHOLE)
        return response

    monkeypatch.setattr("urllib.request.HTTPSHandler.https_open", answer)
    download_with(tmp_path, ARCHIVE_URL="https://localhost/archive.tar.gz", NUM_IMAGES=3)
    assert_unpacked(tmp_path)
