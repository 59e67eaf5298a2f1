"""Texts that runs print at their end: short, on one line, harmless to the terminal."""

from pathlib import Path

from egspo_lightning.cli.run_summary import ELLIPSIS, _shortened, readable_path


def test_a_long_answer_keeps_beginning_and_end():
    text = "First " + "and then " * 40 + "\\boxed{7}"
    shown = _shortened(text, 50)
    assert len(shown) <= 50
    assert shown.startswith("First and")
    assert ELLIPSIS in shown
    assert shown.endswith("\\boxed{7}")
    assert _shortened("short", 50) == "short"
    assert len(_shortened(text, 1)) < 10  # on a terminal of any width


def test_control_characters_of_an_answer_are_visible():
    assert _shortened("a\x1b[2Jb\nc\u202ed", 50) == "a\u241b[2Jb c<U+202E>d"


def test_a_path_below_the_working_folder_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert readable_path(tmp_path / "logs" / "a.jsonl") == Path("logs/a.jsonl")
    assert readable_path(tmp_path.parent / "a.jsonl") == tmp_path.parent / "a.jsonl"
