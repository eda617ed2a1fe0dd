"""Downloads of a small archive from a local server."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from breakhis.data.download import download

from tests.support.archives import NEWER, WHOLE
from tests.support.servers import Answer, Server

whole = partial(Answer, WHOLE)
newer = partial(Answer, NEWER, etag='"2"')


def download_with(directory: Path, sha256: str | None = None, **constants: Any) -> Path:
    """Download with other constants of the module, such as `ATTEMPTS=2`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(f"breakhis.data.download.{name}", value)
        return download(directory, sha256)


def fetch(directory: Path, server: Server, sha256: str | None = None, **constants: Any) -> Path:
    """Download the three images of a server, with short pauses if not said otherwise."""
    quick = {"NUM_IMAGES": 3, "ATTEMPTS": 4, "PAUSE": 0.001, "TIMEOUT": 10.0}
    return download_with(directory, sha256, ARCHIVE_URL=server.url, **quick | constants)
