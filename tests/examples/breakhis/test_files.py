from pathlib import Path

import pytest
from breakhis.files import read_csv, write_atomically, write_csv


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda part: part.write_text("old"))

    def fail(part: Path) -> None:
        part.write_text("half of the new")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"


def test_the_disk_has_the_content_before_the_name(tmp_path, monkeypatch):
    path, names = tmp_path / "file", []
    monkeypatch.setattr("breakhis.files.fsync", lambda descriptor: names.append(path.exists()))
    write_atomically(path, lambda part: part.write_text("new"))
    assert names == [False]
    assert path.read_text() == "new"


def test_a_table_is_read_as_it_was_written(tmp_path):
    write_csv(tmp_path / "table.csv", [{"name": "a, b", "share": 0.5}, {"name": "c", "share": None}])
    assert read_csv(tmp_path / "table.csv") == [{"name": "a, b", "share": "0.5"}, {"name": "c", "share": ""}]
