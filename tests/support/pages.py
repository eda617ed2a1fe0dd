"""The code, the tables and the addresses of a page of the documentation."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def python_blocks(page: Path) -> list[str]:
    """Return the Python code blocks of a Markdown page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_block(block: str, page: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a code block of `page`, which may use `names`, and return these with the names that it defines."""
    names = {} if names is None else names
    exec(compile(block, str(page), "exec"), names)
    return names


_ADDRESS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
_NO_PROSE = {"code", "script", "style"}


class BuiltPage(HTMLParser):
    """A page as a browser reads it.

    Attributes:
        text: The page as it is written.
        tags: Names of all elements, in the order of the page.
        ids: Values of all attributes "id".
        fetched: Addresses that a browser fetches to show the page.
        images: Addresses of all images.
        rows: Text of the data cells of each table row.
        prose: Text outside of code, scripts and styles.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.fetched: list[str] = []
        self.images: list[str] = []
        self.rows: list[list[str]] = []
        self.prose = ""
        self._open: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.fetched += fetched_by_style(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self._open.append(tag)
        if "id" in attributes:
            self.ids.add(attributes["id"] or "")
        if address := attributes.get(_ADDRESS.get(tag, "")):
            self.fetched.append(address)
            if tag == "img":
                self.images.append(address)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:  # elements like <img> have no end: they close with the element around them
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "td" in self._open:
            self.rows[-1][-1] += data
        if not _NO_PROSE.intersection(self._open):
            self.prose += data


def fetched_by_style(text: str) -> list[str]:
    """Return the addresses in the `url(...)` of a style sheet, or of the styles in a page."""
    return [address.strip("'\"") for address in re.findall(r"url\(([^)]*)\)", text)]
