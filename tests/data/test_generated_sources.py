from itertools import pairwise

import pytest

from egspo_lightning.data.generated_sources import GeneratedDemonstrations, GeneratedProblems
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.data.tasks.expressions import ExpressionTask
from egspo_lightning.errors import UserError


def test_demonstrations_are_distinct_reproducible_and_from_the_train_split():
    demonstrations = GeneratedDemonstrations(num_demonstrations=200).load()
    assert demonstrations == GeneratedDemonstrations(num_demonstrations=200).load()
    assert len({d.problem for d in demonstrations}) == 200
    assert all(ArithmeticTask().contains(d.problem, "train") for d in demonstrations)
    assert demonstrations != GeneratedDemonstrations(num_demonstrations=200, seed=1).load()


def test_problems_are_a_pure_function_of_seed_and_position():
    source, again, other = GeneratedProblems(), GeneratedProblems(), GeneratedProblems()
    assert source.prepare(0, frozenset()) == again.prepare(0, frozenset()) == other.prepare(1, frozenset()) == 0
    assert source.draw(0, 10) + source.draw(10, 10) == again.draw(0, 20)
    assert source.draw(0, 20) != other.draw(0, 20)
    assert all(ArithmeticTask().contains(p.problem, "train") for p in source.draw(0, 200))


def test_excluded_problems_are_counted_and_only_they_are_replaced():
    free, barred = GeneratedProblems(), GeneratedProblems()
    free.prepare(0, frozenset())
    unbarred = free.draw(0, 50)
    excluded = frozenset({unbarred[3].problem, unbarred[7].problem, "what is love?"})
    assert barred.prepare(0, excluded) == 2
    drawn = barred.draw(0, 50)
    assert not excluded & {p.problem for p in drawn}
    assert {i for i, pair in enumerate(zip(unbarred, drawn, strict=True)) if pair[0] != pair[1]} >= {3, 7}
    assert sum(a != b for a, b in zip(unbarred, drawn, strict=True)) <= 4


def test_prepare_refuses_excluding_all_problems():
    task = ArithmeticTask(num_digits=1)
    every = frozenset(f"{a}+{b}=?" for a in range(10) for b in range(10))
    with pytest.raises(UserError, match="excluded problems"):
        GeneratedProblems(task).prepare(0, every)


def test_draw_before_prepare_raises_runtime_error():
    with pytest.raises(RuntimeError, match="before prepare"):
        GeneratedProblems().draw(0, 1)


def test_problems_at_neighboring_positions_differ():
    source = GeneratedProblems()
    source.prepare(0, frozenset())
    problems = source.draw(0, 400)
    assert sum(a == b for a, b in pairwise(problems)) <= 2
    assert len({p.problem for p in problems}) > 350


def test_generated_sources_accept_any_problem_family():
    task = ExpressionTask(num_operators=3)
    demonstrations, source = GeneratedDemonstrations(50, task=task).load(), GeneratedProblems(task)
    assert all(task.contains(d.problem, "train") for d in demonstrations)
    held_out, other = task.distinct(0, "test", 5), ArithmeticTask().distinct(0, "train", 5)
    assert source.prepare(0, frozenset(p.problem for p in (*held_out, *other))) == 0
    assert all(task.contains(p.problem, "train") for p in source.draw(0, 50))


def test_seed_selects_problems_and_solutions():
    task = ExpressionTask()
    zero, one = (GeneratedDemonstrations(50, seed, task).load() for seed in (0, 1))
    problems = task.distinct("demonstrations/0", "train", 50)
    assert zero == [task.solve(p, 0) for p in problems]
    assert zero != [task.solve(p, 1) for p in problems]
    assert {d.problem for d in zero} != {d.problem for d in one}
