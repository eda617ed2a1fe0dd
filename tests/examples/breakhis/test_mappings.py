import pytest
from breakhis.mappings import read_json, read_yaml


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_a_mapping_is_read(read, tmp_path):
    (tmp_path / "file").write_text('{"a": [1, 2.5], "µ": null}', encoding="utf-8")
    assert read(tmp_path / "file") == {"a": [1, 2.5], "µ": None}


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"7", b"null", b'"text"', b"\xff\xfe{}", b"[" * 100_000, b"\x00", b'{"a": 1'],
    ids=lambda content: repr(content[:8]),
)
def test_what_is_no_mapping_is_refused_by_name(read, content, tmp_path):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken must be a mapping in (JSON|YAML), got .") as refused:
        read(path)
    assert "\n" not in str(refused.value)


def test_a_tag_of_python_makes_no_object(tmp_path):
    path = tmp_path / "tagged.yaml"
    path.write_text("a: !!python/object/apply:pathlib.Path.touch [executed]")
    with pytest.raises(ValueError, match=r"tagged.yaml must be a mapping in YAML, got .*python/object/apply"):
        read_yaml(path)


def test_a_missing_file_is_an_error_of_the_file_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
