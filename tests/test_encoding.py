"""Text files are UTF-8 on every system: Python's own choice differs between systems."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What has an `open` of its own, for bytes.
BYTES = {"os", "Image", "gzip", "tarfile"}


def unsaid_encodings(source: str) -> list[int]:
    """Return the lines with a call that reads or writes text without its encoding."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and lacks_encoding(node)]


def lacks_encoding(call: ast.Call) -> bool:
    """Return whether a call is one of `open`, `path.open`, `path.read_text` and `path.write_text`, without encoding."""
    if any(keyword.arg in ("encoding", None) for keyword in call.keywords):  # None: `**arguments`
        return False
    modes = [*call.args, *(keyword.value for keyword in call.keywords)]
    is_binary = any(
        isinstance(node, ast.Constant) and "b" in str(node.value) for mode in modes for node in ast.walk(mode)
    )
    match call.func:
        case ast.Name(id="open"):
            return not is_binary
        case ast.Attribute(value=ast.Name(id=owner), attr="open") if owner in BYTES:
            return False
        case ast.Attribute(value=ast.Name() | ast.BinOp() | ast.Attribute(), attr="open"):
            return not is_binary
        case ast.Attribute(attr="read_text"):
            return not call.args
        case ast.Attribute(attr="write_text"):
            return len(call.args) < 2
    return False


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_each_text_file_has_its_encoding(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    missing = {str(path): lines for path in paths if (lines := unsaid_encodings(path.read_text(encoding="utf-8")))}
    assert not missing


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        *(("path.read_text()", True), ("path.read_text('utf-8')", False), ("path.read_text(encoding='utf-8')", False)),
        *(("path.write_text(text)", True), ("path.write_text(text, 'utf-8')", False)),
        *(("path.open()", True), ("path.open('w', newline='')", True), ("path.open('rb')", False)),
        *(("open(path)", True), ("open(path, mode='wb')", False), ("path.open(**TEXT)", False)),
        *(("Image.open(file)", False), ("os.open(path, flags)", False), ("make().open(request)", False)),
        *(("(folder / name).open()", True), ("self.path.open('a')", True), ("path.open('ab' if x else 'wb')", False)),
        ("write_text(path, text)", False),
    ],
)
def test_a_missing_encoding_is_seen(source, missing):
    assert unsaid_encodings(source) == ([1] if missing else [])
