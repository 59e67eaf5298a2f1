import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.data.tasks.family import SPLITS
from egspo_lightning.errors import UserError
from egspo_lightning.rewards.extraction import extract_boxed
from egspo_lightning.types import Problem

TASKS = st.builds(
    ArithmeticTask,
    num_terms=st.integers(2, 5),
    num_digits=st.integers(1, 5),
    operators=st.sampled_from(["+", "+-"]),
)


def value(expression: str) -> int:
    return sum(int(number) for number in re.findall(r"[+-]?\d+", expression))


def test_arithmetic_solutions_by_hand():
    problem, solve = Problem("1", "47+85=?", "132"), ArithmeticTask().solve
    assert solve(problem).solution == r"7+5=12 4+8+1=13 \boxed{132}"
    chain = solve(problem._replace(problem="47+85+59=?")).solution
    assert chain == "7+5=12 4+8+1=13 47+85=132\n2+9=11 3+5+1=9 1+0=1 \\boxed{191}"
    assert solve(problem._replace(problem="102-47=?")).solution == r"12-7=5 10-4-1=5 1-0-1=0 \boxed{55}"


@given(task=TASKS, split=st.sampled_from(sorted(SPLITS)), seed=st.integers(0, 9), index=st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_every_step_and_answer_is_correct(task, split, seed, index):
    problem = task.problem(seed, split, index)
    assert re.fullmatch(r"\d+([+-]\d+)+=\?", problem.problem)
    assert problem.answer == str(value(problem.problem))
    assert int(problem.answer) >= 0
    numbers = re.findall(r"\d+", problem.problem)
    assert len(numbers) == task.num_terms
    assert {len(number) for number in numbers} == {task.num_digits}

    solution = task.solve(problem).solution
    assert extract_boxed(solution) == problem.answer
    equations = re.findall(r"([\d+-]+)=(\d+)", solution)
    assert len(equations) >= task.num_terms - 1
    assert all(value(left) == int(right) for left, right in equations)
    assert task.contains(problem.problem, split)


@given(task=TASKS, index=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_answer_digits_come_from_the_last_line_of_steps(task, index):
    last_line = task.solve(task.problem(0, "train", index)).solution.splitlines()[-1]
    columns = re.findall(r"=(\d+)", last_line)
    digits = "".join(column[-1] for column in columns[:-1])[::-1]
    assert int(columns[-1] + digits) == int(extract_boxed(last_line))


def test_solutions_have_at_most_45_characters():
    task = ArithmeticTask()
    assert all(len(task.solve(p).solution) <= 45 for p in task.distinct(0, "train", 800))


def test_splits_are_disjoint_and_have_the_documented_size():
    task = ArithmeticTask()
    texts = [f"{a}+{b}=?" for a in range(10, 100) for b in range(10, 100)]
    held = {split: {text for text in texts if task.contains(text, split)} for split in SPLITS}
    assert sum(len(texts) for texts in held.values()) == len(texts) == len(set().union(*held.values()))
    assert 0.77 < len(held["train"]) / len(texts) < 0.83
    assert 0.08 < len(held["validation"]) / len(texts) < 0.12


@pytest.mark.parametrize("text", ["47+85=?", "13+99=?"])
def test_commuted_problems_share_a_split(text):
    first, second = text.removesuffix("=?").split("+")
    task = ArithmeticTask()
    for split in SPLITS:
        assert task.contains(text, split) == task.contains(f"{second}+{first}=?", split)
    chain = ArithmeticTask(num_terms=3, operators="+-")
    for split in SPLITS:
        assert chain.contains("47+85-12=?", split) == chain.contains("85-12+47=?", split)


def test_first_problem_of_each_split_is_stable():
    # Literal values: a different hash would move problems from test to train between versions.
    task = ArithmeticTask()
    assert [task.problem(0, split, 0).problem for split in SPLITS] == EXPECTED_FIRST
    assert [s for t in ("47+85=?", "10+10=?", "99+99=?") for s in SPLITS if task.contains(t, s)] == EXPECTED_SPLITS


EXPECTED_FIRST = ["45+64=?", "74+14=?", "84+64=?"]
EXPECTED_SPLITS = ["train", "train", "train"]


@pytest.mark.parametrize(
    "text", ["7+85=?", "47+85+12=?", "47-12=?", "47+85", "047+85=?", "47 + 85=?", "12-47=?", "hello"]
)
def test_contains_is_false_for_other_texts(text):
    assert not any(ArithmeticTask().contains(text, split) for split in SPLITS)


def test_contains_is_false_for_negative_running_totals():
    assert not any(ArithmeticTask(3, 2, "+-").contains("12-47+90=?", split) for split in SPLITS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_terms": 1}, "num_terms"), ({"num_digits": 0}, "num_digits")],
)
def test_invalid_arithmetic_settings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        ArithmeticTask(**arguments)
