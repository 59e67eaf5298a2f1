"""Weighted sum of rewards whose terms are logged separately."""

from __future__ import annotations

import inspect
import math
import struct
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, SupportsFloat

from egspo_lightning.errors import UserError, require
from egspo_lightning.rewards.column_arguments import ColumnParameters
from egspo_lightning.rewards.functions import CorrectnessReward, Details, Reward
from egspo_lightning.rewards.grading import MathGrader


class Scored(NamedTuple):
    """The reward of one completion, with its terms."""

    reward: float
    terms: dict[str, float]
    """Each term by name, before its weight."""


class WeightedReward(Reward):
    """The weighted sum of rewards, each with a name under which it is logged: ``rollout/reward/<name>``.

        R = sum_k w_k R_k

    Args:
        terms: The rewards by name, each given by its class name or class_path.
        weights: Their weights by name, 1 by default. A reward of weight 0 is only logged.
        grader: Decides which answers are correct, whatever the rewards are; null for the grader of the first term
            that has one.

    Raises:
        UserError: there is no term, or a weight is not finite or names no term.
    """

    def __init__(
        self, terms: dict[str, Reward], weights: dict[str, float] | None = None, grader: MathGrader | None = None
    ) -> None:
        require(bool(terms), "data.reward.terms", "none", "at least one reward")
        weights = weights or {}
        for name, weight in weights.items():
            if name not in terms:
                raise UserError(f"data.reward.weights: {name!r} is no term. Give weights to {', '.join(terms)}.")
            require(math.isfinite(weight), f"data.reward.weights.{name}", weight, "a finite number")
        self.terms = dict(terms)
        self.weights = {name: float(weights.get(name, 1.0)) for name in terms}
        graders = [term.grader for term in terms.values() if isinstance(term, CorrectnessReward | WeightedReward)]
        self.grader: MathGrader = grader or (graders[0] if graders else MathGrader())

    @classmethod
    def of(cls, reward: Reward) -> WeightedReward:
        """Wrap a reward as the only term of a sum, named after itself; a sum is returned as it is."""
        if isinstance(reward, WeightedReward):
            return reward
        is_correctness = isinstance(reward, CorrectnessReward)
        return cls({"correctness" if is_correctness else getattr(reward, "__name__", type(reward).__name__): reward})

    def __call__(
        self, completions: Sequence[str], golds: Sequence[str], details: Sequence[Details] = ()
    ) -> list[float]:
        """Return the sums, in the order of the completions; see `score`."""
        return [scored.reward for scored in self.score(completions, golds, details)]

    def score(self, completions: Sequence[str], golds: Sequence[str], details: Sequence[Details] = ()) -> list[Scored]:
        """Return the sums with their terms, in the order of the completions.

        Raises:
            UserError: a term does not return one finite number for each completion.
            RuntimeError: a term has raised; its own error is the cause.
        """
        columns = {name: _values(name, term, completions, golds, details) for name, term in self.terms.items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        sums = [sum(self.weights[name] * value for name, value in row.items()) for row in rows]
        return [
            Scored(_single_precision(_finite(total, "data.reward: the weighted sum")), row)
            for total, row in zip(sums, rows, strict=True)
        ]

    @property
    def needs_answers(self) -> bool:
        """Whether a term of weight other than 0 rewards correct answers, see `CorrectnessReward`."""
        return any(getattr(term, "needs_answers", False) for name, term in self.terms.items() if self.weights[name])

    @property
    def columns(self) -> frozenset[str] | None:
        """The columns of the data that the terms name; None where a term takes all of them."""
        wanted = [parameters for _, parameters in self._column_parameters()]
        if any(parameters.takes_all for parameters in wanted):
            return None
        return frozenset().union(*(parameters.named for parameters in wanted))

    def require_columns(self, columns: Collection[str], known: Collection[str] = ()) -> list[str]:
        """Check each term against the columns of the data; return a sentence for each term that receives some.

        Args:
            columns: the columns that problems keep for the reward
            known: all columns of the data, for messages

        Raises:
            UserError: the data lacks a column, or a column has the name of another argument.
        """
        facts = []
        for where, parameters in self._column_parameters():
            parameters.require(columns, where, known)
            if fact := parameters.summary(columns):
                facts.append(f"{where} {fact}.")
        return facts

    def _column_parameters(self) -> Iterator[tuple[str, ColumnParameters]]:
        for name, term in self.terms.items():
            if isinstance(term, WeightedReward):
                yield from term._column_parameters()
            else:
                yield _where(name, term), ColumnParameters.of(term)

    def require_fit(self, max_completion_length: int) -> None:
        """Let each term check the length limit.

        Raises:
            UserError: a term does not fit it.
        """
        for term in self.terms.values():
            if hasattr(term, "require_fit"):
                term.require_fit(max_completion_length)

    def close(self) -> None:
        """End the processes of the grader and of the terms. Scoring after it starts new ones."""
        self.grader.close()
        for term in self.terms.values():
            if hasattr(term, "close"):
                term.close()


def _values(
    name: str, term: Any, completions: Sequence[str], golds: Sequence[str], details: Sequence[Details]
) -> list[float]:
    """Return the rewards of a term as floats. Errors name the term."""
    where = _where(name, term)
    try:
        known: dict[str, Any] = ColumnParameters.of(term).values(details) if details else {}
        if details and "details" in inspect.signature(term).parameters:
            known["details"] = details
        given = term(completions, golds, **known)
    except UserError:
        raise
    except Exception as error:
        raise RuntimeError(f"{where} raised {type(error).__name__}: {error}") from error
    if hasattr(given, "tolist"):  # a tensor or an array
        given = given.tolist()
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise UserError(f"{where} gave {_shown(given)}. A list with a number for each completion is needed.")
    if len(given) != len(completions):
        raise UserError(f"{where} gave {len(given)} rewards for {len(completions)} completions. One each is needed.")
    return [_finite(value, where) for value in given]


def _where(name: str, term: Any) -> str:
    source = term if hasattr(term, "__qualname__") else type(term)
    return f"data.reward: {name} ({source.__module__}.{source.__qualname__})"


def _finite(value: object, where: str) -> float:
    """Return a number of any type as a float. Texts and arrays with dimensions are refused."""
    try:
        number = float(value) if isinstance(value, SupportsFloat) and not getattr(value, "ndim", 0) else math.nan
        _single_precision(number)  # refuses what is too large
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where} gave a reward of {_shown(value)}. Rewards must be finite numbers.")
    return number


def _single_precision(value: float) -> float:
    """Round to float32, as advantages do, so that sums that differ by float64 rounding alone make a flat group.

    Raises:
        OverflowError: the value is too large.
    """
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return float(rounded)


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
