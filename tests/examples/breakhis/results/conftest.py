"""Fixtures of the tests of figures."""

import pytest

from tests.support.figures import make_drawer


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Call a drawing function, check its file, and return the figure."""
    return make_drawer(tmp_path, monkeypatch)
