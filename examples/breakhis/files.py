"""Files that are written completely or not at all, and CSV tables: a row is a dict, the first row names the columns."""

import csv
import os.path
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from os import fsync
from pathlib import Path
from typing import Any

# Spreadsheets run a cell that begins with one of these as a formula (OWASP, "CSV Injection"); the last four are = + - @
# in full width. A quote in front marks such a cell as text. A text that begins with a quote is marked too, so that
# it can be told from those.
_MARKED = (*"=+-@\t\r\n\uff1d\uff0b\uff0d\uff20", "'")
# With a decimal comma, spreadsheets end a cell at a semicolon, and some end it at a tab, also between quotation marks.
# So the text after such a character is marked like a new cell. It is also marked if it begins with a quotation mark,
# which a reader may drop, and if it is empty, because the closing quotation mark of the CSV cell follows it.
_INNER = re.compile(rf"([;\t\r\n])(?=[{re.escape(''.join(_MARKED))}\"]|\Z)")
_INNER_MARKED = re.compile(r"([;\t\r\n])'")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)

# On Linux, the name of a file may hold bytes that are no UTF-8. They are written and read as they are.
_TEXT: Any = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and then rename it, so that it is never seen half written, even after a kill.

    The other name is hidden, short and different at each call, so that two processes may write the same file. After an
    error, Ctrl-C included, nothing is left of it. `remove_parts` removes what a killed process leaves. The file gets
    the mode of a new file (`umask`).

    Args:
        path: The file.
        write: Writes to the path that it is called with.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    part.touch(exist_ok=False)
    try:
        mode = part.stat().st_mode
        write(part)
        with part.open("rb+") as file:
            fsync(file.fileno())  # without it a power cut could keep the new name and lose the content
        if part.stat().st_mode != mode:  # `write` may have put another file there
            part.chmod(mode)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path) -> None:
    """Remove what `write_atomically` has left in a folder of a process that was killed. Nobody may be writing there."""
    for part in folder.glob(f".{'[0-9a-f]' * 16}.part"):
        part.unlink()


def real_path(path: Path) -> Path:
    """Follow links; unlike `Path.resolve` before Python 3.13, raise nothing for links in a circle."""
    return Path(os.path.realpath(path))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write at least one row; None becomes an empty cell.

    A text that a spreadsheet would run as a formula gets a quote in front, and so does such a text after a semicolon, a
    tab or a line break; `read_csv` takes the quotes away again. Numbers stay numbers, except those with a sign in the
    first column, which other cells could continue to a formula.

    Raises:
        ValueError: A text has a NUL character. No name has one, and many readers take it for the end of the file.
    """
    names = list(rows[0])
    table = [
        {key: _mark(value, is_first=key == names[0]) for key, value in row.items()}
        for row in (dict(zip(names, names, strict=True)), *rows)
    ]
    for cell in (cell for row in table for cell in row.values()):
        if "\0" in cell:
            raise ValueError(f"{path} must be a table of texts without a NUL character, got {cell!r:.60}")
    # Before 3.13, Python does not quote a cell with a carriage return, and then reads that as the end of the row.
    has_return = any("\r" in cell for row in table for cell in row.values())

    def write(part: Path) -> None:
        with part.open("w", **_TEXT) as file:
            quoting = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
            csv.DictWriter(file, names, lineterminator="\n", quoting=quoting).writerows(table)

    write_atomically(path, write)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file from `write_csv`, in their order. A row that was cut off lacks the last columns.

    Raises:
        csv.Error: The file is no table.
    """
    with path.open(**_TEXT) as file:
        rows = [[_unmark(cell) for cell in row] for row in csv.reader(file, strict=True) if row]
    if any("\0" in cell for row in rows for cell in row):
        raise csv.Error("a NUL character, which no text has")
    return [dict(zip(rows[0], row, strict=False)) for row in rows[1:]]


def _mark(value: object, is_first: bool) -> str:
    """Return the cell of a value, which no spreadsheet takes for a formula."""
    text = "" if value is None else str(value)
    is_marked = text.startswith(_MARKED) and (is_first or not _NUMBER.fullmatch(text))
    return "'" * is_marked + _INNER.sub(r"\1'", text)


def _unmark(cell: str) -> str:
    """Return the text of a cell from `_mark`."""
    return _INNER_MARKED.sub(r"\1", cell.removeprefix("'"))
