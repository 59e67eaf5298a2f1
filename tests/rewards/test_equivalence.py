from collections.abc import Sequence

import pytest

from egspo_lightning.rewards.equivalence import equivalence_classes
from egspo_lightning.rewards.grading import MathGrader

HANGING_ANSWER = r"9^{9^{9^{9}}}+x"


class Recorder:
    """Compares answers by their first letter and records its calls."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, str]]] = []

    def __call__(self, answers: Sequence[str], golds: Sequence[str]) -> list[bool | None]:
        self.calls.append(list(zip(answers, golds, strict=True)))
        return [None if "?" in answer + gold else answer[0] == gold[0] for answer, gold in self.calls[-1]]


@pytest.mark.parametrize(
    ("answers", "classes"),
    [
        (["1/2", r"\frac{1}{2}", "0.5", "2", None, "0.50"], [0, 0, 0, 1, None, 0]),
        ([r"\frac{1}{\sqrt{3}}", "x", r"\frac{\sqrt{3}}{3}", "x"], [0, 1, 0, 1]),
        (["x+1", "x+2", "1+x", "2+x", "x+3"], [0, 1, 0, 1, 2]),
        ([None, "", "   ", "7"], [None, None, None, 0]),
        ([r"so \boxed{4}", "4"], [0, 0]),
        ([r"10\%", "10", "0.1"], [0, 0, 1]),
        (["0.1", r"10\%", "10"], [0, 1, 1]),
        (["12", "12 cm", "12 m"], [0, 0, 1]),
        ([], []),
    ],
)
def test_equivalence_classes_are_numbered_in_order_of_appearance(
    grader: MathGrader, answers: list[str | None], classes: list[int | None]
) -> None:
    assert grader.equivalence_classes([answers]) == [classes]


def test_groups_have_separate_classes(grader: MathGrader) -> None:
    assert grader.equivalence_classes([["x+1", "1+x"], [], ["x", "x+1", "x"]]) == [[0, 0], [], [0, 1, 0]]


def test_comparing_numbers_or_equal_spellings_starts_no_process() -> None:
    with MathGrader() as grader:
        answers = ["72", "72.0", "73", r"\sqrt 3", r"$\sqrt{ 3}$"]
        assert grader.equivalence_classes([answers[:3], answers[3:4] * 2]) == [[0, 0, 1], [0, 0]]
        assert grader.worker_pids() == []


def test_answer_joins_the_first_class_all_of_whose_members_are_equal() -> None:
    def compare(answers: Sequence[str], golds: Sequence[str]) -> list[bool | None]:
        return [abs(len(answer) - len(gold)) <= 1 for answer, gold in zip(answers, golds, strict=True)]

    assert equivalence_classes([["a+", "a++", "a+++"]], compare) == [[0, 0, 1]]
    assert equivalence_classes([["a++", "a+", "a+++"]], compare) == [[0, 0, 1]]


def test_groups_share_calls_and_no_spelling_is_compared_twice() -> None:
    recorder = Recorder()
    classes = equivalence_classes([["a+b", "a + b", "b+c", "a+c"], ["c+a", "c+b"]], recorder)
    assert classes == [[0, 0, 1, 0], [0, 0]]
    probes, pairs, reverse = recorder.calls
    assert [gold for _, gold in probes] == ["1"] * 5
    assert pairs == [("b+c", "a+b"), ("a+c", "a+b"), ("c+b", "c+a")]
    assert reverse == [("a+b", "a+c"), ("c+a", "c+b")]


def test_incomparable_answer_gets_its_own_class_after_one_comparison() -> None:
    recorder = Recorder()
    assert equivalence_classes([["a?", "a+b", "a?", "a+c", "a?+1"]], recorder) == [[0, 1, 0, 1, 2]]
    assert sum("?" in "".join(pair) for call in recorder.calls for pair in call) == 2


def test_hanging_answer_times_out_once_per_group() -> None:
    answers = [HANGING_ANSWER, *(f"x+{n}" for n in range(1, 9))]
    statuses: list[str] = []
    with MathGrader(deadline_s=2.0) as grader:

        def compare(answers: Sequence[str], golds: Sequence[str]) -> list[bool | None]:
            grades = grader.grade_answers(answers, golds)
            statuses.extend(grade.status for grade in grades)
            return [grade.correct if grade.status == "graded" else None for grade in grades]

        assert equivalence_classes([answers], compare) == [list(range(9))]
    assert statuses.count("timeout") == 1
