"""Names of files and classes, as they are shown and as they become the names of new files.

A name can hold anything: escape sequences that command a terminal, line breaks that forge a line of the log, characters
that turn the direction of the text, markup, or bytes that are no UTF-8.
"""

import hashlib
import html
import os
import re

MAX_BYTES = 255  # length of a file's name on common file systems
_HASH_DIGITS = 10
_UNSAFE = re.compile(r"[^\w.,=+@ -]|^[.-]")


def printable(name: object) -> str:
    r"""Return a name as it may be printed: what is no printable character becomes an escape, such as `\x1b`."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(name))


def in_markdown(name: object) -> str:
    """Return a name as it may stand in a table of Markdown, whose markup becomes HTML on a page."""
    return html.escape(printable(name), quote=False).replace("|", "&#124;")


def file_name(name: str, suffix: str) -> str:
    """Return a name for a new file: `name` with a suffix, if that is a plain and short name.

    Otherwise unusual characters become `_`, the name is cut, and a short hash of the whole name is added, so that
    different names get different files.

    Args:
        name: Any text.
        suffix: The suffix, such as ".png".
    """
    plain = _UNSAFE.sub("_", name)
    if plain == name and len(os.fsencode(name + suffix)) <= MAX_BYTES:
        return name + suffix
    return with_hash(plain, name, suffix)


def with_hash(start: str, name: str, suffix: str) -> str:
    """Return a file's name of `start`, cut if it is too long, a short hash of `name`, and a suffix."""
    end = f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:_HASH_DIGITS]}{suffix}"
    return os.fsencode(start)[: MAX_BYTES - len(end)].decode("utf-8", "ignore") + end
