import os

import pytest
from breakhis.names import file_name, in_markdown, printable
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Größe 5 µm 日本.png", "Größe 5 µm 日本.png"),
        ("\x1b[2J\x1b]0;title\x07.png", r"\x1b[2J\x1b]0;title\x07.png"),
        ("a\nWARNING: forged\r.png", r"a\nWARNING: forged\r.png"),
        ("\x9b31m.png", r"\x9b31m.png"),  # an escape sequence of one character
        ("gpj.\u202eexe", r"gpj.\u202eexe"),  # turns the direction of the text
        ("a\u2028b\u200bc\ue000", r"a\u2028b\u200bc\ue000"),
        (os.fsdecode(b"f\xe4rbung.png"), r"f\udce4rbung.png"),
    ],
)
def test_what_cannot_be_printed_becomes_an_escape(name, expected):
    assert printable(name) == expected


@given(st.binary())
def test_any_name_can_be_printed(name):
    shown = printable(os.fsdecode(name))
    assert shown.isprintable()
    shown.encode("utf-8")


def test_markup_is_text_in_a_table_of_markdown():
    assert in_markdown("<img src=x onerror=alert(1)>|\x1b&") == "&lt;img src=x onerror=alert(1)&gt;&#124;\\x1b&amp;"
    assert in_markdown("0.812 ± 0.010, n = 3 'KFDE'") == "0.812 ± 0.010, n = 3 'KFDE'"


@pytest.mark.parametrize("name", ["gates-KFDE-100X-stages.2.kfde", "a+b=c, d@e", "größe"])
def test_plain_names_are_kept(name):
    assert file_name(name, ".png") == f"{name}.png"


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "a/b", "a\\b", "C:x", ".hidden", "-flag", "\x1b[2J", "x" * 252, "ä" * 200, "\udce4", "a\0b"],
)
def test_other_names_are_plain_and_short_with_a_hash(name):
    result = file_name(name, ".png")
    assert len(os.fsencode(result)) <= 255
    assert result.endswith(".png")
    assert result.isprintable()
    assert not set(result) & set("/\\:\0")
    assert result[0] not in ".-"
    assert result != file_name(name + "y", ".png")
