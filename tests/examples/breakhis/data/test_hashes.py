import hashlib

import pytest
from breakhis.data.hashes import changed_files, hash_files


def test_hashes_are_those_of_sha256sum_in_the_order_of_the_files(tmp_path):
    contents = {"b": b"", "a": b"abc", "c": bytes(3_000_000)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    hashes = hash_files(tmp_path / name for name in contents)
    assert list(hashes) == [tmp_path / name for name in contents]
    assert list(hashes.values()) == [hashlib.sha256(content).hexdigest() for content in contents.values()]
    assert hashes[tmp_path / "a"].startswith("ba7816bf8f01cfea")  # of the standard, FIPS 180
    assert changed_files(hashes) == []


def test_every_kind_of_change_is_seen(tmp_path):
    names = ["same", "flipped", "longer", "shorter", "emptied", "removed", "folder"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 1000)
    hashes = hash_files(tmp_path / name for name in names)
    content = bytearray((tmp_path / "flipped").read_bytes())
    content[3500] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    (tmp_path / "longer").write_bytes((tmp_path / "longer").read_bytes() + b"\0")
    (tmp_path / "shorter").write_bytes((tmp_path / "shorter").read_bytes()[:-1])
    (tmp_path / "emptied").write_bytes(b"")
    for name in ("removed", "folder"):
        (tmp_path / name).unlink()
    (tmp_path / "folder").mkdir()
    assert [path.name for path in changed_files(hashes)] == names[1:]


def test_a_missing_file_has_no_hash(tmp_path):
    with pytest.raises(FileNotFoundError):
        hash_files([tmp_path / "none"])
