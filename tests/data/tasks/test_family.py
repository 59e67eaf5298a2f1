"""Properties shared by all families of generated problems."""

import random
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.data.tasks.expressions import ExpressionTask
from egspo_lightning.data.tasks.family import SPLITS, ProblemFamily
from egspo_lightning.data.tasks.word_problems import WordProblemTask
from egspo_lightning.errors import UserError
from egspo_lightning.rewards.extraction import extract_boxed
from egspo_lightning.types import Demonstration, Problem

EXPRESSIONS = [ExpressionTask(), ExpressionTask(6, 9, 50), ExpressionTask(5, names_operations=True)]
FAMILIES = [ArithmeticTask(), ArithmeticTask(3, 2, "+-"), *EXPRESSIONS, WordProblemTask()]
each_family = pytest.mark.parametrize("task", FAMILIES, ids=repr)


@dataclass(frozen=True)
class Doubles(ProblemFamily):
    """Problems 2*0 to 2*98; odd factors are drawn too, but have no key."""

    name: ClassVar[str] = "doubles"

    def draw(self, rng: random.Random) -> str:
        return f"2*{rng.randrange(100)}=?"

    def key(self, text: str) -> str | None:
        number = text.removeprefix("2*").removesuffix("=?")
        return number if number.isdecimal() and int(number) % 2 == 0 else None

    def answer(self, text: str) -> str:
        return str(2 * int(text[2:-2]))

    def solve(self, problem: Problem, seed: int | str = 0) -> Demonstration:
        return Demonstration(problem.id, problem.problem, f"\\boxed{{{self.answer(problem.problem)}}}")


def test_custom_problem_family():
    problems = Doubles().distinct(0, "train", 20)
    assert len({p.problem for p in problems}) == 20
    assert all(int(p.answer) % 4 == 0 and Doubles().contains(p.problem, "train") for p in problems)
    assert problems[0].id == f"doubles/{problems[0].problem[:-2]}"
    held = [sum(Doubles().contains(f"2*{i}=?", split) for split in SPLITS) for i in range(100)]
    assert held == [1, 0] * 50


@each_family
@given(seed=st.integers(0, 9), split=st.sampled_from(sorted(SPLITS)), index=st.integers(0, 10**9))
@settings(max_examples=50, deadline=None)
def test_problem_is_in_one_split_and_its_solution_is_correct(task, seed, split, index):
    problem = task.problem(seed, split, index)
    assert problem == task.problem(seed, split, index)
    assert [s for s in SPLITS if task.contains(problem.problem, s)] == [split]
    demonstration = task.solve(problem)
    assert demonstration == task.solve(problem)
    assert demonstration[:2] == problem[:2]
    assert extract_boxed(demonstration.solution) == problem.answer == task.answer(problem.problem)


@each_family
def test_splits_have_the_documented_sizes(task):
    rng = random.Random(0)
    texts = [text for text in (task.draw(rng) for _ in range(3000)) if task.key(text) is not None]
    shares = {split: sum(task.contains(text, split) for text in texts) / len(texts) for split in SPLITS}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.04)


@each_family
def test_distinct_problems_are_unique_and_prefix_stable(task):
    problems = task.distinct(0, "test", 200)
    assert len({p.problem for p in problems}) == len({p.id for p in problems}) == 200
    assert task.distinct(0, "test", 50) == problems[:50]
    assert task.distinct(1, "test", 200) != problems


@each_family
def test_excluded_problems_are_replaced_by_the_next_draw(task):
    free = [task.problem(0, "train", i) for i in range(50)]
    excluded = frozenset({free[3].problem, free[7].problem})
    barred = [task.problem(0, "train", i, excluded) for i in range(50)]
    assert not excluded & {p.problem for p in barred}
    assert [i for i in range(50) if free[i] != barred[i]] == [i for i in range(50) if free[i].problem in excluded]


def test_settings_do_not_change_the_split_of_a_problem():
    small, large = ExpressionTask(), ExpressionTask(max_number=9, max_value=50)
    for split in SPLITS:
        for problem in small.distinct(0, split, 100):
            assert large.contains(problem.problem, split)


def test_families_do_not_share_problems():
    sums, expressions = ArithmeticTask(num_digits=1), ExpressionTask(num_operators=1, max_number=9, max_value=81)
    for split in SPLITS:
        assert not any(expressions.contains(p.problem, split) for p in sums.distinct(0, split, 5))
        assert not any(sums.contains(p.problem, split) for p in expressions.distinct(0, split, 5))


def test_too_many_distinct_problems_are_refused_with_counts():
    with pytest.raises(UserError, match=r"100 different problems of split 'test'.*only \d+ came up.*num_digits=1"):
        ArithmeticTask(num_digits=1).distinct(0, "test", 100)


def test_excluding_all_problems_is_refused_with_counts():
    every = frozenset(f"2*{i}=?" for i in range(100))
    with pytest.raises(UserError, match=r"split 'test' in \d+ draws of Doubles\(\) with 100 excluded problems"):
        Doubles().problem(0, "test", 0, every)
