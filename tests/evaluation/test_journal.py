import json

import pytest

from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.answers import Answer
from egspo_lightning.evaluation.journal import Journal, fingerprint
from egspo_lightning.types import Problem

PROBLEMS = [Problem("a", "1+1=?", "2"), Problem("b", "ä?\u2028", "3"), Problem("c", "why?", "")]
SETTINGS = {"benchmark": "sums", "seed": 1, "weights": "0123"}


def answers(index: int, count: int = 2) -> list[Answer]:
    problem = PROBLEMS[index]
    correct = True if problem.answer else None
    return [Answer(problem, i, f"text {i}\n\u2028", "2", 0, correct, "graded", 7, False) for i in range(count)]


def journal(folder, rank=0, **settings) -> Journal:
    made = Journal(folder, SETTINGS | settings, PROBLEMS, 2, rank)
    made.claim()
    return made


def test_journal_rows_round_trip(tmp_path):
    first = journal(tmp_path)
    first.append(answers(0))
    rows = [json.loads(line) for line in (tmp_path / "completions-rank-0.jsonl").read_bytes().splitlines()]
    assert rows[1] == {
        "benchmark": "sums",
        "id": "a",
        "problem": "1+1=?",
        "answer": "2",
        "sample": 1,
        "completion": "text 1\n\u2028",
        "extracted": "2",
        "answer_class": 0,
        "correct": True,
        "status": "graded",
        "length": 7,
        "is_truncated": False,
    }
    first.append(answers(2))
    assert journal(tmp_path).read() == {"a": answers(0), "c": answers(2)}


def test_merged_file_does_not_depend_on_ranks_or_order(tmp_path):
    one = journal(tmp_path / "one")
    for i in range(3):
        one.append(answers(i))
    one.merge()
    for rank, index in ((1, 2), (0, 1), (1, 0)):
        journal(tmp_path / "two", rank).append(answers(index))
    assert len(list((tmp_path / "two").glob("completions-rank-*.jsonl"))) == 2
    journal(tmp_path / "two").merge()
    merged = (tmp_path / "two" / "completions.jsonl").read_bytes()
    assert merged == (tmp_path / "one" / "completions.jsonl").read_bytes()
    assert [json.loads(line)["id"] for line in merged.splitlines()] == ["a", "a", "b", "b", "c", "c"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["completions.jsonl", "settings.json"]


def test_answers_read_from_the_journal_are_not_written_again(tmp_path):
    journal(tmp_path).append(answers(0))
    later = journal(tmp_path, rank=3)
    later.read()
    later.append(answers(0) + answers(1))
    assert len((tmp_path / "completions-rank-3.jsonl").read_bytes().splitlines()) == 2
    later.append(later.read()["a"])
    later.merge()
    assert len((tmp_path / "completions.jsonl").read_bytes().splitlines()) == 4


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_truncated_last_line_is_dropped_and_answered_again(tmp_path, cut):
    journal(tmp_path).append(answers(0) + answers(1))
    path = tmp_path / "completions-rank-0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    later = journal(tmp_path)
    assert later.read() == {"a": answers(0)}
    later.append(answers(0) + answers(1))
    assert later.read() == {"a": answers(0), "b": answers(1)}
    later.merge()
    assert len(later.completions.read_bytes().splitlines()) == 4


def test_problem_with_too_few_answers_counts_as_unanswered(tmp_path):
    journal(tmp_path).append(answers(0, count=1) + answers(1))
    assert journal(tmp_path).read() == {"b": answers(1)}


def test_broken_inner_line_is_refused_with_file_and_line(tmp_path):
    journal(tmp_path).append(answers(0))
    path = tmp_path / "completions-rank-0.jsonl"
    path.write_bytes(b"{]\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"completions-rank-0\.jsonl:1: broken .* Delete the line"):
        journal(tmp_path).read()


def test_answers_under_other_settings_are_refused_with_setting_names(tmp_path):
    journal(tmp_path)
    journal(tmp_path)
    with pytest.raises(UserError, match=r"holds answers under other settings: seed, weights\. Choose another"):
        journal(tmp_path, seed=2, weights="4567")


def test_fingerprint_depends_on_settings_not_their_order():
    assert fingerprint(SETTINGS) == fingerprint(dict(reversed(SETTINGS.items())))
    assert fingerprint(SETTINGS) != fingerprint(SETTINGS | {"seed": 2})
    assert len(fingerprint(SETTINGS)) == 12
