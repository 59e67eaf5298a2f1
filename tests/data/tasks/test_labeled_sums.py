import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egspo_lightning.data.tasks.family import SPLITS
from egspo_lightning.data.tasks.labeled_sums import LabeledSumTask
from egspo_lightning.errors import UserError
from egspo_lightning.types import Problem

SHORT = LabeledSumTask(2, 4, 9)
TASKS = st.builds(
    lambda fewest, more, most, share: LabeledSumTask(fewest, fewest + more, most, share),
    st.integers(2, 12),
    st.integers(0, 12),
    st.integers(5, 30),
    st.sampled_from([0.0, 0.4, 1.0]),
)


def solutions(problem: Problem, in_order: float, count: int = 100) -> set[str]:
    task = LabeledSumTask(2, 4, 9, in_order)
    return {task.solve(problem, seed).solution for seed in range(count)}


def test_labeled_sum_solutions_by_hand():
    problem = Problem("1", "b7 c3 d8 e7=?", "25")
    from_left, largest_first = r"b7+c3=10+d8=18+e7=25 \boxed{25}", r"d8+b7=15+e7=22+c3=25 \boxed{25}"
    assert solutions(problem, in_order=0.4) == {from_left, largest_first}
    assert solutions(problem, in_order=1.0) == {from_left}
    assert solutions(problem, in_order=0.0) == {largest_first}


def test_share_of_solutions_from_left_to_right():
    task, problem = LabeledSumTask(2, 4, 9, in_order=0.3), Problem("1", "b7 c8=?", "15")
    count = sum(task.solve(problem, seed).solution.startswith("b7") for seed in range(2000))
    assert count == pytest.approx(600, abs=103)  # five standard deviations


@given(task=TASKS, split=st.sampled_from(sorted(SPLITS)), seed=st.integers(0, 9), index=st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_solution_adds_every_number_once_with_the_right_totals(task, split, seed, index):
    problem = task.problem(seed, split, index)
    asked = problem.problem.removesuffix("=?").split(" ")
    assert task.min_terms <= len(asked) <= task.max_terms
    assert all(1 <= int(term[1:]) <= task.max_number for term in asked)
    assert "".join(term[0] for term in asked) in "abcdefghijklmnopqrstuvwxyz"
    chain, box = task.solve(problem, seed).solution.split(" ")
    steps = re.findall(r"([a-z][0-9]+)(?:=([0-9]+))?", chain)
    added, totals = [term for term, _ in steps], [total for _, total in steps]
    numbers = [int(term[1:]) for term in added]
    assert sorted(added) == asked
    assert totals == ["", *(str(sum(numbers[:i])) for i in range(2, len(numbers) + 1))]
    assert added == asked or numbers == sorted(numbers, reverse=True)
    assert box == rf"\boxed{{{sum(numbers)}}}"
    assert problem.answer == str(sum(numbers))


def test_default_solutions_fit_the_recipe():
    task = LabeledSumTask()
    lengths = [len(task.solve(problem).solution) for problem in task.distinct(0, "train", 1000)]
    assert min(lengths) >= 60
    assert max(lengths) <= 80


def test_problems_with_the_same_numbers_have_the_same_key():
    keys = [SHORT.key(text) for text in ("b7 c3 d8=?", "x3 y7 z8=?", "a8 b7 c3=?")]
    assert keys[0] is not None
    assert len(set(keys)) == 1
    assert SHORT.key("b7 c3 d9=?") not in (None, keys[0])
    assert SHORT.key("b1 c12=?") is None
    assert LabeledSumTask(2, 3, 30).key("b1 c12=?") != LabeledSumTask(2, 3, 30).key("b11 c2=?")


def test_demonstrations_with_fewer_terms_are_no_problems_of_the_benchmark():
    shorter, benchmark = LabeledSumTask(4, 8), LabeledSumTask()
    assert all(benchmark.key(problem.problem) is None for problem in shorter.distinct(0, "train", 200))


@pytest.mark.parametrize(
    "text",
    [
        "b7=?",  # one number
        "b7 c3 d8 e1 f1=?",  # five numbers
        "c3 b7=?",
        "b7 d3=?",
        "b7 b3=?",
        "b0 c3=?",
        "b07 c3=?",
        "b10 c3=?",  # above max_number
        "b7  c3=?",
        "b7 c3",
        "b7 c3=? ",
        "B7 c3=?",
        "b-7 c3=?",
        "47+85=?",
        "",
        "=?",
    ],
)
def test_key_is_none_for_other_texts(text):
    assert SHORT.key("b7 c3=?") is not None
    assert SHORT.key(text) is None


def test_first_problem_of_each_split_is_stable():
    # Literal values: a different hash would move problems from test to train between versions.
    assert [LabeledSumTask().problem(0, split, 0).problem for split in SPLITS] == EXPECTED_FIRST


EXPECTED_FIRST = [
    "n4 o2 p2 q2 r4 s4 t3 u5 v1 w3=?",
    "e1 f1 g2 h4 i2 j3 k5 l3 m5 n1=?",
    "g1 h5 i5 j2 k3 l3 m5 n1 o5 p3=?",
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_terms": 1}, "min_terms must be at least 2, got 1"),
        ({"max_terms": 9}, r"max_terms must be from min_terms \(10\) to 26, got 9"),
        ({"max_terms": 27}, r"max_terms must be from min_terms \(10\) to 26, got 27"),
        ({"max_number": 1}, "max_number must be at least 2, got 1"),
        ({"in_order": 1.5}, "in_order must be from 0 to 1, got 1.5"),
    ],
)
def test_invalid_labeled_sum_settings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        LabeledSumTask(**arguments)
