"""Test cases of public graders, hostile completions and reference solutions, if the data is beside the checkout."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from egspo_lightning.data.answer_formats import AnswerExtractor, extract_answer
from egspo_lightning.rewards.grading import MathGrader

Locate = Callable[[str], Path]

DISAGREEMENTS = {
    "gc-0006": "free text: math-verify reads 1,22 as a list in LaTeX; upstream's test reads only plain expressions",
    "gc-0028": "upstream's test reads only LaTeX and finds none across lines; we also read the plain number",
    "gc-0029": "as gc-0028, with \\( \\)",
    "gc-0127": "upstream's test rounds to 2 decimals and accepts 0.33 for 1/3",
    "gc-0133": "upstream's test rounds to 2 decimals; a test of another grader expects the opposite for this pair",
    "gc-0032": "the two sides of the equation differ",
    "gc-0094": "7 = 11 is false, so the chain of equations is no answer",
    "gc-0109": "3 + 3 = 2 is false, so the chain of equations is no answer",
    "gc-0181": "upstream's test does not allow relations against sets; its twin gc-0180 does",
    "gc-0245": "upstream's test turns off strictness: f(x) is not f(y)",
    "gc-0255": "1 + 1/e is not 1 - 1/e",
}
"""Uncontested cases in which our verdict differs from the label, by id."""
CONTRADICTED = {"gc-0032", "gc-0094", "gc-0109", "gc-0181"}
"""Labels that another label contradicts: pa-139 refuses a false chain of equations, gc-0180 accepts the pair."""

NOT_GOLD = {
    "math/test/414": "two boxes, -2 and 1; the answer of the data set is only the last",
    "math/test/2703": "two boxes, 3 and 2/5; the answer of the data set is only the last",
    "math/test/2912": "two boxes with a point each; the answer of the data set is only the last",
}
"""MATH demonstrations whose solution does not match their own reference answer, by id."""


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


CONTESTED_2026 = {
    "pa-022": "the last box counts, also where it approximates the one before",
    "pa-134": "a box that is never closed does not hide an earlier one",
}
"""Contested cases of 2026 in which our verdict differs from the label, by id."""


def test_grader_is_right_where_public_graders_were_wrong(shared_file: Locate) -> None:
    cases = rows(shared_file("grading/public_2026.jsonl"))
    wrong = _wrong(cases)
    assert wrong == CONTESTED_2026.keys()
    assert all(case["contested"] for case in cases if case["id"] in wrong)


@pytest.mark.slow
def test_grader_agrees_with_public_graders(shared_file: Locate) -> None:
    cases = [case for case in rows(shared_file("grading/cases.jsonl")) if not case.get("contested")]
    disagreements = _wrong(cases)
    assert disagreements == DISAGREEMENTS.keys()
    undisputed = {case["id"] for case in cases} - CONTRADICTED
    assert 1 - len(disagreements & undisputed) / len(undisputed) >= 0.98


def _wrong(cases: list[dict[str, Any]]) -> set[str]:
    """Return the ids of the cases with another verdict than their label."""
    wrong = set()
    with (
        MathGrader(num_workers=2, deadline_s=20.0) as boxed,
        MathGrader(num_workers=2, deadline_s=20.0, extraction="lenient") as lenient,
    ):
        for kind, grade in (("bare", boxed.grade_answers), ("think", boxed.grade), ("text", lenient.grade)):
            part = [case for case in cases if case["kind"] == kind]
            grades = grade([case["pred"] for case in part], [case["gold"] for case in part])
            late = {case["id"] for case, it in zip(part, grades, strict=True) if it.status in ("timeout", "crashed")}
            assert late <= {"gc-0345"}, "the reference of this case is 10^{10^{10^{10}}}"
            wrong |= {case["id"] for case, it in zip(part, grades, strict=True) if it.correct != case["expected"]}
    return wrong


@pytest.mark.parametrize(
    ("are_compute_bombs", "count", "deadline_s"),
    [pytest.param(False, 279, 10.0), pytest.param(True, 46, 1.0, marks=pytest.mark.slow)],
    ids=["others", "bombs"],
)
def test_hostile_completions_are_graded_within_time_and_memory(
    shared_file: Locate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    are_compute_bombs: bool,
    count: int,
    deadline_s: float,
) -> None:
    cases = rows(shared_file("grading/hostile.jsonl"))
    cases = [case for case in cases if (case["category"] == "compute-bomb") == are_compute_bombs]
    assert len(cases) == count
    monkeypatch.chdir(tmp_path)
    before = _resident_mb()
    with MathGrader(num_workers=2, deadline_s=deadline_s) as grader:
        texts = ["".join(part * times for part, times in case["parts"]) for case in cases]
        grades = grader.grade(texts, [case["gold"] for case in cases])
        pids = grader.worker_pids()
    assert max(grade.seconds for grade in grades) < deadline_s + 1.0
    assert _resident_mb() - before < 200
    assert not any(_is_running(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []  # some cases would write a file if they were executed
    wanted = [(case, it) for case, it in zip(cases, grades, strict=True) if case["want"] is not None]
    wrong = {case["id"] for case, it in wanted if it.correct != case["want"]}
    assert wrong == (set() if are_compute_bombs else {"hx-0216", "hx-0224"}), (
        "the answers of these cases are right but not boxed"
    )


@pytest.mark.parametrize(
    ("file", "extractor", "count"),
    [
        ("math500", "boxed", 500),
        ("math_demos", "boxed", 4321),
        ("aime24", "framebox", 30),
        ("aime25", "framebox", 29),
        ("gsm8k_test", "gsm8k", 1319),
    ],
)
def test_reference_solutions_are_correct(
    shared_file: Locate, file: str, extractor: AnswerExtractor, count: int
) -> None:
    solved = [row for row in rows(shared_file(f"data/{file}.jsonl")) if row.get("solution")]
    assert len(solved) == count
    with MathGrader() as grader:
        if extractor == "boxed":
            grades = grader.grade([row["solution"] for row in solved], [row["answer"] for row in solved])
        else:
            answers = [extract_answer(row["solution"], extractor, row["id"]) for row in solved]
            grades = grader.grade_answers(answers, [row["answer"] for row in solved])
    wrong = {row["id"] for row, grade in zip(solved, grades, strict=True) if not grade.correct}
    assert wrong == (NOT_GOLD.keys() if file == "math_demos" else set())


@pytest.mark.parametrize("file", ["math500", "aime24", "aime25", "amc23", "gsm8k_test", "olympiadbench"])
def test_gold_answers_equal_themselves_and_differ_from_the_next(shared_file: Locate, file: str) -> None:
    golds = [str(row["answer"]) for row in rows(shared_file(f"data/{file}.jsonl"))]
    with MathGrader(num_workers=2) as grader:
        assert all(grade.correct for grade in grader.grade([rf"\boxed{{{gold}}}" for gold in golds], golds))
        shifted = grader.grade_answers(golds[1:], golds[:-1])
    assert {grade.status for grade in shifted} == {"graded"}
    accepted = [pair for pair, grade in zip(zip(golds[1:], golds, strict=False), shifted, strict=True) if grade.correct]
    assert all(_is_same(*pair) for pair in accepted), accepted


def _is_same(answer: str, gold: str) -> bool:
    """Whether two gold answers are equal to a reader: the same text, or only one of them with "x="."""
    answer, gold = (text.strip("$").removeprefix("x=") for text in (answer, gold))
    return answer == gold or (answer.replace(".", "").isdigit() and float(answer) == float(gold))


def _resident_mb() -> float:
    if not Path("/proc/self/statm").is_file():
        pytest.skip("needs /proc to see how much memory this process has")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
