"""Files that are cut off or damaged."""

import re

import pytest
from breakhis.data.images import find_faults, open_rgb
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFile

from tests.support.pictures import encode, noise

FILES = {
    "png": encode(noise(), "PNG"),
    "jpg": encode(noise(), "JPEG"),
    "progressive.jpg": encode(noise(), "JPEG", progressive=True),
    "tif": encode(noise(), "TIFF"),
    "lzw.tif": encode(noise(), "TIFF", compression="tiff_lzw"),
    "bmp": encode(noise(), "BMP"),
    "grey.bmp": encode(noise().convert("L"), "BMP"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.98])
def test_truncated_files_are_refused(tmp_path, name, share):
    path = tmp_path / name
    path.write_bytes(FILES[name][: int(share * len(FILES[name]))])
    with pytest.raises(ValueError, match=re.escape(f"path must be an image file, got {str(path)!r}: it ")) as caught:
        open_rgb(path)
    assert str(caught.value).count("\n") == 0
    assert find_faults([path])[path] in str(caught.value)


def test_pil_does_not_pad_truncated_files():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@settings(deadline=None, max_examples=500)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_a_file_truncated_anywhere_is_complete_or_refused(tmp_path_factory, name, data):
    content = FILES[name]
    path = tmp_path_factory.getbasetemp() / "cut"
    path.write_bytes(content)
    expected = open_rgb(path)
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        result = open_rgb(path)
    except ValueError:
        return
    assert result.tobytes() == expected.tobytes()  # such as a PNG without its last chunk


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_nothing_but_value_error_escapes_from_damaged_files(tmp_path_factory, name, data):
    damaged = bytearray(FILES[name])
    offsets = st.one_of(st.integers(0, 200), st.integers(0, len(damaged) - 1))  # headers are short but matter most
    for offset, value in data.draw(st.lists(st.tuples(offsets, st.integers(0, 255)), min_size=1, max_size=8)):
        damaged[offset] = value
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(damaged))] * 2)))
    if data.draw(st.booleans()):
        del damaged[start : min(stop, start + 64)]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    try:
        result = open_rgb(path)
    except ValueError:
        assert path in find_faults([path])
        return
    assert result.mode == "RGB"
    if name == "png":  # its header has a checksum
        assert result.size == (48, 40)
