import dataclasses
import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egspo_lightning.data.tasks.expressions import ExpressionTask
from egspo_lightning.data.tasks.family import SPLITS
from egspo_lightning.errors import UserError
from egspo_lightning.types import Problem

TASKS = st.builds(
    ExpressionTask, num_operators=st.integers(1, 6), max_number=st.integers(4, 12), max_value=st.integers(20, 200)
)
EXAMPLE = Problem("1", "3*(5+4)-8-6=?", "13")


def value(expression: str) -> int:
    """Evaluate the expression with Python, independently of the package."""
    assert re.fullmatch(r"[0-9+*()-]+", expression)
    return int(eval(expression))


def num_operators(expression: str) -> int:
    return len(re.findall(r"[+*-]", expression.removeprefix("-")))


def chain(solution: str) -> list[str]:
    r"""The expressions of a solution, including the number in ``\boxed{}``."""
    *steps, last = solution.split("=")
    box = re.fullmatch(r"\\boxed\{(-?[0-9]+)\}", last)
    assert box
    return [*steps, box[1]]


def solutions(task: ExpressionTask, problem: Problem, count: int) -> Counter[str]:
    return Counter(task.solve(problem, seed).solution for seed in range(count))


def test_expression_solutions_by_hand():
    assert set(solutions(ExpressionTask(max_number=8, max_value=50), EXAMPLE, 200)) == {
        r"3*9-8-6=27-8-6=19-6=\boxed{13}",
        r"3*9-8-6=27-8-6=27-14=\boxed{13}",
        r"3*9-8-6=3*9-14=27-14=\boxed{13}",
        r"3*(5+4)-14=3*9-14=27-14=\boxed{13}",
    }
    single = Problem("1", "3*4=?", "12")
    assert set(solutions(ExpressionTask(1), single, 20)) == {r"\boxed{12}"}
    below = Problem("1", "1-5-2+3*1=?", "-3")
    assert r"1-7+3*1=-6+3*1=-6+3=\boxed{-3}" in solutions(ExpressionTask(), below, 200)
    nothing = Problem("1", "4-2*2+1*1=?", "1")
    assert r"4-4+1*1=0+1*1=0+1=\boxed{1}" in solutions(ExpressionTask(), nothing, 200)


def test_named_operations_by_hand():
    task = ExpressionTask(max_number=8, max_value=50, names_operations=True)
    assert set(solutions(task, EXAMPLE, 200)) == {
        "5+4=9:3*9-8-6\n3*9=27:27-8-6\n27-8=19:19-6\n19-6=13:\\boxed{13}",
        "5+4=9:3*9-8-6\n3*9=27:27-8-6\n-8-6=-14:27-14\n27-14=13:\\boxed{13}",
        "5+4=9:3*9-8-6\n-8-6=-14:3*9-14\n3*9=27:27-14\n27-14=13:\\boxed{13}",
        "-8-6=-14:3*(5+4)-14\n5+4=9:3*9-14\n3*9=27:27-14\n27-14=13:\\boxed{13}",
    }
    product = Problem("1", "1-2*3=?", "-5")
    assert set(solutions(ExpressionTask(2, names_operations=True), product, 20)) == {"2*3=6:1-6\n1-6=-5:\\boxed{-5}"}


@given(task=TASKS, seed=st.integers(0, 9), index=st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_named_operations_are_true_and_lead_to_the_same_chain(task, seed, index):
    named = dataclasses.replace(task, names_operations=True)
    problem = named.problem(seed, "train", index)
    assert problem == task.problem(seed, "train", index)
    steps = [line.split(":") for line in named.solve(problem, seed).solution.split("\n")]
    assert "=".join(expression for _, expression in steps) == task.solve(problem, seed).solution
    for operation, _ in steps:
        left, right = operation.split("=")
        assert num_operators(left) == 1
        assert value(left) == value(right)


def test_next_steps_are_equally_likely():
    first = Counter(text.split("=")[0] for text in solutions(ExpressionTask(), EXAMPLE, 1000).elements())
    assert set(first) == {"3*9-8-6", "3*(5+4)-14"}
    assert first["3*9-8-6"] == pytest.approx(500, abs=80)  # five standard deviations


@given(task=TASKS, split=st.sampled_from(sorted(SPLITS)), seed=st.integers(0, 9), index=st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_every_step_is_correct_and_one_operation_shorter(task, split, seed, index):
    problem = task.problem(seed, split, index)
    text = problem.problem.removesuffix("=?")
    assert num_operators(text) == task.num_operators
    assert all(1 <= int(number) <= task.max_number for number in re.findall(r"[0-9]+", text))
    expressions = [text, *chain(task.solve(problem, seed).solution)]
    assert [num_operators(e) for e in expressions] == list(range(task.num_operators, -1, -1))
    assert {value(e) for e in expressions} == {int(problem.answer)}
    assert all(int(n) <= task.max_value for e in expressions for n in re.findall(r"[0-9]+", e))
    assert expressions[-1] == problem.answer


def test_a_step_changes_only_the_combined_numbers():
    task = ExpressionTask()
    for problem in task.distinct(0, "train", 200):
        expressions = [problem.problem.removesuffix("=?"), *chain(task.solve(problem).solution)]
        for before, after in pairwise(expressions):
            numbers = [Counter(re.findall(r"[0-9]+", e)) for e in (before, after)]
            assert sum((numbers[0] - numbers[1]).values()) <= 2  # the two combined numbers
            assert sum((numbers[1] - numbers[0]).values()) <= 1  # their result


def test_most_problems_have_several_solutions():
    task = ExpressionTask()
    counts = [len(solutions(task, problem, 20)) for problem in task.distinct(0, "train", 100)]
    assert sum(count > 1 for count in counts) > 90


def test_answers_have_both_signs_and_problems_have_products():
    problems = ExpressionTask().distinct(0, "train", 500)
    assert 100 < sum(p.answer.startswith("-") for p in problems) < 400
    assert all("*" in p.problem for p in problems)
    assert any("(" in p.problem for p in problems)


def test_problems_and_solutions_have_bounded_length():
    task = ExpressionTask()
    problems = task.distinct(0, "train", 2000)
    assert max(len(p.problem) for p in problems) <= 16
    assert max(len(task.solve(p).solution) for p in problems) <= 40


@pytest.mark.parametrize("text", ["(4+5)*3-8-6", "3*(4+5)-6-8", "(5+4)*3-6-8"])
def test_reordered_problems_have_the_same_key(text):
    task = ExpressionTask(max_number=8, max_value=50)
    assert task.key(EXAMPLE.problem) == task.key(f"{text}=?")
    assert task.key(EXAMPLE.problem) != task.key("3*(5-4)-8-6=?")
    assert task.key(EXAMPLE.problem) != task.key("3*(5+4)+8-6=?")


def test_first_problem_of_each_split_is_stable():
    # Literal values: a different hash would move problems from test to train between versions.
    assert [ExpressionTask().problem(0, split, 0).problem for split in SPLITS] == EXPECTED_FIRST


EXPECTED_FIRST = ["1*(4+1)+1*3=?", "3*2+(5-2)*4=?", "4*1-2*(4-2)=?"]


@pytest.mark.parametrize(
    "text",
    [
        "3*(5+4)-2=?",  # three operations
        "1+1+1+1+1=?",  # no product
        "3*(4-5)-2-1=?",  # a negative value in parentheses
        "3*(4+4)-2-1=?",  # intermediate value 24
        "6*1+1+1+1=?",  # a 6
        "0*1+1+1+1=?",
        "-3*1+1+1+1=?",
        "03*1+1+1+1=?",
        "3*1+1+1+1",
        "3 * 1+1+1+1=?",
        "3*1*1+1+1=?",
        "3*(1+1+1)+1=?",
        "(1+1)*(1+1)+1=?",
        "(3*1)+1+1+1=?",
        "47+85=?",
        "hello",
        "",
        "=?",
    ],
)
def test_key_is_none_for_other_texts(text):
    assert ExpressionTask().key(text) is None


@given(text=st.text("0123459+-*()=?", max_size=12), num_operators=st.integers(1, 3))
@settings(max_examples=500, deadline=None)
def test_answer_of_any_accepted_text_equals_python_eval(text, num_operators):
    task = ExpressionTask(num_operators)
    for expression in (text, f"2*{text}", f"1+{text}*3"):
        if task.key(f"{expression}=?") is not None:
            assert task.answer(f"{expression}=?") == str(value(expression))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_operators": 0}, "num_operators must be from 1 to 8, got 0"),
        ({"num_operators": 9}, "num_operators must be from 1 to 8, got 9"),
        ({"max_number": 1}, "max_number must be at least 2, got 1"),
        ({"max_number": 21}, r"max_value must be at least max_number \(21\), got 20"),
    ],
)
def test_invalid_expression_settings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        ExpressionTask(**arguments)
