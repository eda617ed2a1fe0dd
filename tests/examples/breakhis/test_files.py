import csv
import math
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from breakhis.files import read_csv, real_path, remove_parts, write_atomically, write_csv
from hypothesis import example, given, settings
from hypothesis import strategies as st

FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda part: part.write_text("old"))

    for error in (OSError("no space left"), KeyboardInterrupt("no space left")):

        def fail(part: Path, error: BaseException = error) -> None:
            part.write_text("half of the new")
            raise error

        with pytest.raises(type(error), match="no space left"):
            write_atomically(path, fail)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_of_a_file_that_cannot_get_its_name(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "full").touch()
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "folder", lambda part: part.write_text("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_process_has_half_written_is_removed_and_nothing_else(tmp_path):
    code = "import os, sys, pathlib; from breakhis.files import write_atomically\n"
    code += "write_atomically(pathlib.Path(sys.argv[1]), lambda part: os.kill(os.getpid(), 9))"
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "examples")}
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    (leftover,) = tmp_path.iterdir()
    names = ["a.part", ".part", ".0123456789abcdef", ".0123456789abcdefg.part", "x.0123456789abcdef.part"]
    for name in names:
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert not leftover.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    remove_parts(tmp_path / "none")


def test_writers_of_the_same_file_do_not_meet(tmp_path):
    path, both_wrote, parts = tmp_path / "file", threading.Barrier(2, timeout=10), []

    def write(part: Path, text: str) -> None:
        part.write_text(text)
        both_wrote.wait()
        parts.append((part, part.read_text() == text))

    threads = [
        threading.Thread(target=write_atomically, args=(path, lambda part, text=text: write(part, text)))
        for text in ("a" * 100, "b" * 50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({part for part, _ in parts}) == 2
    assert all(whole for _, whole in parts)
    assert path.read_text() in ("a" * 100, "b" * 50)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_is_that_of_a_new_file(tmp_path, mask):
    def private(part: Path) -> None:  # as safetensors writes
        part.unlink()
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", private)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_the_longest_name_is_written(tmp_path):
    path = tmp_path / ("x" * 251 + ".csv")
    write_csv(path, [{"a": 1}])
    assert read_csv(path) == [{"a": "1"}]


def test_the_disk_has_the_content_before_the_name(tmp_path, monkeypatch):
    path, names = tmp_path / "file", []
    monkeypatch.setattr("breakhis.files.fsync", lambda descriptor: names.append(path.exists()))
    write_atomically(path, lambda part: part.write_text("new"))
    assert names == [False]
    assert path.read_text() == "new"


def test_a_table_is_read_as_it_was_written(tmp_path):
    write_csv(tmp_path / "table.csv", [{"name": "a, b", "share": 0.5}, {"name": "c", "share": None}])
    assert read_csv(tmp_path / "table.csv") == [{"name": "a, b", "share": "0.5"}, {"name": "c", "share": ""}]


@pytest.mark.parametrize("start", [*FORMULAS, "'", "'="])
def test_a_formula_is_written_as_text(tmp_path, start):
    name = start + "cmd|' /C calc'!A0"
    write_csv(tmp_path / "table.csv", [{name: name, "b": "b"}, {name: "plain", "b": name}])
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        raw = list(csv.reader(file))
    assert raw == [[f"'{name}", "b"], [f"'{name}", "b"], ["plain", f"'{name}"]]
    assert read_csv(tmp_path / "table.csv") == [{name: name, "b": "b"}, {name: "plain", "b": name}]


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        *((-1, "-1"), (-0.25, "-0.25"), ("-1.5e-07", "-1.5e-07"), ("+3", "+3"), (1e-9, "1e-09"), (None, "")),
        *(("-1+1", "'-1+1"), ("-", "'-"), ("-1\n", "'-1\n'"), ("-\u0661", "'-\u0661"), ("-inf", "'-inf"), ("", "")),
    ],
)
def test_numbers_stay_numbers(tmp_path, value, cell):
    write_csv(tmp_path / "table.csv", [{"a": "x", "b": value}])
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == ["x", cell]


# Names of files: any bytes without NUL, as the system reads them.
NAMES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    st.binary().map(lambda name: os.fsdecode(name.replace(b"\0", b""))),
    st.tuples(
        st.sampled_from([*FORMULAS, "'", '"', ",", "\n"]),
        st.text(st.characters(codec="ascii", exclude_characters="\0")),
    ).map("".join),
    st.text(st.sampled_from([*FORMULAS, *"';\",1a"])),  # many ends of cells
)


@settings(max_examples=30)
@given(rows=st.lists(st.tuples(NAMES, NAMES), min_size=1, max_size=5), header=st.tuples(NAMES, NAMES))
@example(rows=[("a\rb", "x")], header=("a", "b"))  # Python 3.11 writes it without quotation marks
@example(rows=[("", "")], header=("'", "''"))
def test_any_names_are_read_back(tmp_path_factory, rows, header):
    names = (header[0], header[1] if header[1] != header[0] else header[1] + "x")
    path = tmp_path_factory.getbasetemp() / "any.csv"
    table = [dict(zip(names, row, strict=True)) for row in rows]
    write_csv(path, table)
    assert read_csv(path) == table
    for cell in cells_of(path, ","):
        assert not cell.startswith(FORMULAS) or math.isfinite(float(cell)) or "e" in cell.lower()  # a number
    for delimiter in ";\t":
        assert not [cell for cell in cells_of(path, delimiter) if cell.startswith(FORMULAS)]


def cells_of(path: Path, delimiter: str) -> list[str]:
    """Return the cells of a file as a reader with this delimiter sees them."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [cell for row in csv.reader(file, delimiter=delimiter) for cell in row]


INNER = [
    *("x;=1+1", "x;;@a", ";=1", "x;", ";", ";;", "x;'=1", "x;'", "';=1", "'x;'", "=a;=b", "a;-1", "a;b;+c"),
    *('x;"=1+1', 'x;""=1', '";=1', '"=1";=2', 'x";"=1', "x,;=1", 'x,";\n"=1'),
    *("x\t=1", "\t=1", "x\t", "x;\t=1", "x\t;=1", "x\n=1", "x\r=1", "x\r\n=1", "x\n", "x\n;=1", "x;\n=1", "-1;2"),
    *("x;\uff1d1", "x;\uff0b1", "x\t\uff20a", "-1", "+3", "1;2", "x; =1"),
]


@pytest.mark.parametrize("text", INNER)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_cell_is_a_formula_where_semicolons_or_tabs_end_cells(tmp_path, text, place):
    """They end a cell at a semicolon, and some at a tab, where our quotation marks are no longer at its beginning."""
    names, path = ["a", "b", "c"], tmp_path / "table.csv"
    names[place] = text
    row = {name: text if place == index else "plain" for index, name in enumerate(names)}
    table = [row, dict.fromkeys(names, "2+1"), dict.fromkeys(names, text)]
    write_csv(path, table)
    assert read_csv(path) == table
    for delimiter in ";\t":
        cells = cells_of(path, delimiter)
        assert len(cells) >= 4
        assert not [cell for cell in cells if cell.startswith(FORMULAS)]


def test_a_number_with_a_sign_is_no_beginning_of_a_row(tmp_path):
    """Where the decimal point is a comma, the row -1,2+cmd would be one formula."""
    write_csv(tmp_path / "table.csv", [{"a": -1, "b": "2+cmd"}, {"a": 1, "b": -2}])
    assert (tmp_path / "table.csv").read_text() == "a,b\n'-1,2+cmd\n1,-2\n"
    assert read_csv(tmp_path / "table.csv") == [{"a": "-1", "b": "2+cmd"}, {"a": "1", "b": "-2"}]


def test_the_mark_is_one_quote_where_a_cell_would_begin(tmp_path):
    write_csv(tmp_path / "table.csv", [{"a;b": "x;=1+1", "c": "1;2"}, {"a;b": "x;'", "c": -1}])
    text = (tmp_path / "table.csv").read_bytes().decode()
    assert text == "a;b,c\nx;'=1+1,1;2\nx;'',-1\n"


@pytest.mark.parametrize("rows", [[{"a": "x", "b": "x\0y"}], [{"a": "\0"}], [{"a\0": "x"}], [{"a": "x"}, {"a": "x\0"}]])
def test_a_nul_character_is_refused_at_writing(tmp_path, rows):
    """The reader refuses it too: see `test_no_table_is_refused`."""
    with pytest.raises(ValueError, match=r"table.csv must be a table of texts without a NUL character, got .*\\x00"):
        write_csv(tmp_path / "table.csv", rows)
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_was_cut_off_lacks_columns(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n\n'-3\n")
    assert read_csv(tmp_path / "table.csv") == [{"a": "1", "b": "2"}, {"a": "-3"}]
    (tmp_path / "table.csv").write_text("")
    assert read_csv(tmp_path / "table.csv") == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b'a,b\n"1,2\n', "unexpected end of data"), (b"a\0b\n", "a NUL character, which no text has")],
)
def test_no_table_is_refused(tmp_path, content, reason):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(csv.Error, match=reason):
        read_csv(tmp_path / "table.csv")


def test_links_in_a_circle_have_a_path(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert real_path(tmp_path / "a" / "c").name == "c"
    (tmp_path / "link").symlink_to(tmp_path)
    assert real_path(tmp_path / "link" / "x") == tmp_path.resolve() / "x"
