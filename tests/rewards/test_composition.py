from decimal import Decimal
from fractions import Fraction
from pickle import dumps, loads

import numpy as np
import pytest
import torch

from egspo_lightning.errors import UserError
from egspo_lightning.rewards.composition import Scored, WeightedReward
from egspo_lightning.rewards.format import FormatReward
from egspo_lightning.rewards.functions import CorrectnessReward, Details
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rewards.length import SoftLengthPenalty
from egspo_lightning.rewards.workers import Grade
from egspo_lightning.types import Problem

TEXTS = [r"\boxed{x+1}", r"\boxed{1+x} \boxed{1+x}", r"\boxed{y}", "x+1"]
GOLDS = ["1+x"] * 4
LENGTHS = [16, 18, 20, 1]  # max_completion_length is 20


class Constant:
    """A user's reward that returns the given object."""

    def __init__(self, values):
        self.values = values

    def __call__(self, completions, golds):
        return self.values


def length_of(solutions, answers):
    """A user's reward function with other parameter names."""
    return [len(text) for text in solutions]


def details_of(grader):
    problem = Problem("1", "q", "1+x")
    grades = grader.grade(TEXTS, GOLDS)
    return [Details(problem, "", n, 20, False, grade) for n, grade in zip(LENGTHS, grades, strict=True)]


def test_weighted_sum_by_hand():
    reward = WeightedReward(
        {"correctness": CorrectnessReward(), "format": FormatReward(), "length": SoftLengthPenalty(4)},
        {"format": 0.25, "length": 0.5},
    )
    assert reward.score(TEXTS, GOLDS, details_of(reward.grader)) == [
        Scored(1.25, {"correctness": 1.0, "format": 1.0, "length": 0.0}),
        Scored(0.75, {"correctness": 1.0, "format": 0.0, "length": -0.5}),
        Scored(-0.25, {"correctness": 0.0, "format": 1.0, "length": -1.0}),
        Scored(0.0, {"correctness": 0.0, "format": 0.0, "length": 0.0}),
    ]
    assert reward(TEXTS, GOLDS, details_of(reward.grader)) == [1.25, 0.75, -0.25, 0.0]
    reward.close()
    assert reward.grader.worker_pids() == []


def test_zero_and_negative_weights_are_applied():
    reward = WeightedReward({"a": Constant([1.0, 2.0]), "b": Constant([3.0, 5.0])}, {"a": 0.0, "b": -2.0})
    assert reward.score(["x", "y"], ["1", "2"]) == [Scored(-6.0, {"a": 1.0, "b": 3.0}), Scored(-10.0, {"a": 2, "b": 5})]


def test_weighted_reward_can_be_a_term():
    correctness = CorrectnessReward(deadline_s=3.0)
    inner = WeightedReward({"correctness": correctness, "length": SoftLengthPenalty(4)}, {"length": 0.5})
    outer = WeightedReward({"format": FormatReward(), "inner": inner}, {"inner": 2.0})
    assert outer.grader is correctness.grader
    assert outer(TEXTS, GOLDS, details_of(outer.grader)) == [3.0, 1.5, 0.0, 0.0]
    with pytest.raises(UserError, match="buffer = 4 is more"):
        outer.require_fit(3)
    outer.close()
    assert correctness.grader.worker_pids() == []


def test_grader_comes_from_a_term_or_is_created():
    correctness = CorrectnessReward(num_workers=2)
    assert WeightedReward({"length": length_of, "right": correctness}).grader is correctness.grader
    without_grader = WeightedReward.of(length_of)
    assert [grade.correct for grade in without_grader.grader.grade([r"\boxed{x+1}"], ["1+x"])] == [True]
    assert without_grader.grader.worker_pids()
    without_grader.close()
    assert without_grader.grader.worker_pids() == []


@pytest.mark.parametrize(
    ("reward", "name"),
    [(CorrectnessReward(), "correctness"), (length_of, "length_of"), (Constant([]), "Constant")],
)
def test_single_reward_becomes_a_sum_of_one_term(reward, name):
    composed = WeightedReward.of(reward)
    assert composed.terms == {name: reward}
    assert composed.weights == {name: 1.0}
    assert WeightedReward.of(composed) is composed


def test_weighted_reward_can_be_pickled():
    """Spawned ranks receive a pickled copy."""
    reward = loads(dumps(WeightedReward({"correctness": CorrectnessReward(2.0), "format": FormatReward()})))
    assert reward([r"\boxed{2}", "2"], ["2", "2"]) == [3.0, 0.0]


@pytest.mark.parametrize(
    "values",
    [
        [1, 0],
        (1.0, 0.0),
        [True, False],
        [np.float32(1), np.int64(0)],
        [torch.tensor(1.0), torch.tensor(0)],
        [Fraction(1), Decimal(0)],
        np.array([1, 0]),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_rewards_of_any_number_type_become_floats(values):
    found = WeightedReward.of(Constant(values))(["a", "b"], ["1", "2"])
    assert found == [1.0, 0.0]
    assert all(type(value) is float for value in found)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], "gave 1 rewards for 2 completions"),
        ([1.0, 2.0, 3.0], "gave 3 rewards for 2 completions"),
        (torch.ones(3), "gave 3 rewards for 2 completions"),
        ([1.0, float("nan")], "a reward of float nan. Rewards must be finite numbers"),
        ([float("-inf"), 0.0], "a reward of float -inf"),
        (torch.tensor([0.0, float("inf")]), "a reward of float inf"),
        ([10**400, 0], "a reward of int 1000"),
        ([None, 0.0], "a reward of NoneType None"),
        (["1.0", 0.0], "a reward of str '1.0'"),
        ([1j, 0.0], "a reward of complex 1j"),
        ([[1.0], [0.0]], r"a reward of list [1.0]"),
        (torch.ones(2, 1), r"a reward of list [1.0]"),
        ([np.ones(1), 0.0], "a reward of ndarray array"),
        (torch.tensor(1.0), "gave float 1.0. A list with a number for each completion is needed"),
        (1.0, "gave float 1.0. A list"),
        (None, "gave NoneType None. A list"),
        ("10", "gave str '10'. A list"),
        ({1.0, 0.0}, "gave set {"),
        ({"a": 1.0, "b": 0.0}, "gave dict {"),
    ],
)
def test_rewards_that_are_not_finite_numbers_are_refused_with_reward_name(values, words):
    reward = WeightedReward({"format": FormatReward(), "mine": Constant(values)})
    with pytest.raises(UserError) as refusal:
        reward(["a", "b"], ["1", "2"])
    assert str(refusal.value).startswith(f"data.reward: mine ({__name__}.Constant) gave ")
    assert words in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_error_in_a_user_reward_is_wrapped_with_name_and_cause():
    def broken(completions, golds):
        return [1 / len(text) for text in completions]

    reward = WeightedReward({"mine": broken})
    with pytest.raises(
        RuntimeError, match=r"data\.reward: mine \(.*broken\) raised ZeroDivisionError: .*zero"
    ) as raised:
        reward([""], ["1"])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_callable_without_signature_is_refused_by_name():
    details = [Details(Problem("1", "q", "1"), "q", 1, 9, False, Grade(True, "graded", "1", 0.0))]
    with pytest.raises(RuntimeError, match=r"data\.reward: max \(builtins\.max\) raised ValueError: no signature"):
        WeightedReward({"max": max})(["a"], ["1"], details)


def test_given_grader_overrides_that_of_terms():
    first, given = CorrectnessReward(), MathGrader(num_workers=3)
    assert WeightedReward({"a": first}).grader is first.grader
    assert WeightedReward({"a": first}, grader=given).grader is given


def test_user_error_from_a_user_reward_is_not_wrapped():
    def choosy(completions, golds):
        raise UserError("mine.threshold must be set.")

    with pytest.raises(UserError, match=r"^mine\.threshold must be set\.$"):
        WeightedReward({"mine": choosy})(["a"], ["1"])


@pytest.mark.parametrize(
    ("terms", "weights", "message"),
    [
        ({}, None, r"data\.reward\.terms must be at least one reward, got none"),
        ({"a": length_of}, {"b": 1.0}, r"data\.reward\.weights: 'b' is no term\. Give weights to a\."),
        ({"a": length_of}, {"a": float("nan")}, r"data\.reward\.weights\.a must be a finite number, got nan"),
        ({"a": length_of}, {"a": float("inf")}, r"data\.reward\.weights\.a must be a finite number, got inf"),
    ],
)
def test_invalid_terms_and_weights_are_refused(terms, weights, message):
    with pytest.raises(UserError, match=message):
        WeightedReward(terms, weights)
