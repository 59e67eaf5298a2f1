import pytest

from egspo_lightning.analysis.token_text import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("7 + \u05d0\u05d1 \U0001f600", "7 + \u05d0\u05d1 \U0001f600"),
        ("a\0b", "a\u2400b"),
        ("\t\n\r\x1b\x7f", "\u2409\u240a\u240d\u241b\u2421"),
        ("\x85\u2028\u2029", "<U+0085><U+2028><U+2029>"),
        ("\u202eabc\u2066", "<U+202E>abc<U+2066>"),
        ("\u200e\u200f\u061c", "<U+200E><U+200F><U+061C>"),
        ("\ud800", "<U+D800>"),
        ("", ""),
    ],
)
def test_control_and_invisible_characters_become_visible(text, shown):
    assert visible(text) == shown
    shown.encode("utf-8")


def test_spaces_become_visible_on_request():
    assert visible(" a ", spaces=True) == "\u2423a\u2423"
