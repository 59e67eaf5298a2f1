"""Columns of the data as keyword arguments of a reward."""

import pytest

from egspo_lightning.errors import UserError
from egspo_lightning.rewards.column_arguments import ColumnParameters
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.functions import CorrectnessReward, Details
from egspo_lightning.rewards.workers import Grade
from egspo_lightning.types import Problem

COLUMNS = ("level", "tests", "golds")


def details(*columns):
    grade = Grade(True, "graded", "1", 0.0)
    return [Details(Problem("1", "q", "1", columns=each), "", 1, 9, False, grade) for each in columns]


def plain(completions, golds):
    return [0.0 for _ in completions]


def named(completions, golds, level, details=(), scale=2.0):
    return [(each if each is not None else -1) * scale * len(details) for each in level]


def takes_all(texts, answers, /, **columns):
    return [float(sum(values[i] is not None for values in columns.values())) for i in range(len(texts))]


class KeywordOnly:
    def __call__(self, completions, golds, *, tests=None):
        return [float(tests is not None) for _ in completions]


def clashing(completions, golds, **columns):
    return plain(completions, golds)


ROWS = details({"level": 1, "tests": ["a"]}, {"level": 3}), ["x", "y"], ["1", "1"]


@pytest.mark.parametrize(
    ("reward", "columns", "expected"),
    [
        (plain, frozenset(), [0.0, 0.0]),
        (named, frozenset({"level", "scale"}), [4.0, 12.0]),
        (takes_all, None, [2.0, 1.0]),
        (KeywordOnly(), frozenset({"tests"}), [1.0, 1.0]),
        (CorrectnessReward(), frozenset(), [1.0, 1.0]),
        (WeightedReward({"a": named, "b": KeywordOnly()}), frozenset({"level", "scale", "tests"}), [5.0, 13.0]),
    ],
)
def test_reward_receives_the_columns_that_it_names(reward, columns, expected):
    composed = WeightedReward({"outer": reward})
    rows, texts, golds = ROWS
    assert composed.columns == columns
    assert composed(texts, golds, rows) == expected


def test_column_that_no_row_of_a_call_has_is_none_or_keeps_its_default():
    reward = WeightedReward.of(named)
    assert reward(["x"], ["1"], details({"level": None})) == [-2.0]
    assert reward(["x"], ["1"], details(None)) == [-2.0]


def test_missing_column_is_refused_with_the_columns_of_the_data():
    with pytest.raises(UserError, match=r"data\.reward: named .*needs the column 'level'.*Did you mean levels\?"):
        WeightedReward.of(named).require_columns(["levels", "id"])
    with pytest.raises(UserError, match=r"needs the column 'level'.*It has none"):
        WeightedReward({"a": WeightedReward.of(named)}).require_columns([])


def test_column_with_the_name_of_another_argument_is_refused():
    with pytest.raises(UserError, match=r"clashing .*has the argument 'golds', and the data has a column of this name"):
        WeightedReward.of(clashing).require_columns(COLUMNS)
    with pytest.raises(UserError, match="has the argument 'details'"):
        WeightedReward.of(takes_all).require_columns(["details"])
    assert WeightedReward.of(plain).require_columns(["golds", "details"]) == []  # it receives neither


def test_facts_name_the_columns_and_the_defaults():
    (fact,) = WeightedReward.of(named).require_columns(["level", "other"])
    assert "receives the columns level and has no column for scale, which keeps its default." in fact
    (fact,) = WeightedReward.of(takes_all).require_columns(["level", "other"])
    assert fact.endswith("receives the columns level, other.")


def test_builtin_without_a_signature_receives_no_columns():
    assert ColumnParameters.of(max) == ColumnParameters(frozenset(), frozenset(), False, frozenset())
