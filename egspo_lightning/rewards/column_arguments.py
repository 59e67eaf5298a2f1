"""Columns of the data as keyword arguments of rewards: which ones a reward names, and their values for completions.

As in TRL, a reward receives the columns that it names, one value per completion; with ``**kwargs`` it receives all.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from egspo_lightning.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from egspo_lightning.rewards.functions import Details

_NUM_POSITIONAL = 2  # completions and gold answers


class ColumnParameters(NamedTuple):
    """Parameters of a reward that columns may fill."""

    required: frozenset[str]
    """Without a default."""
    optional: frozenset[str]
    """With a default, which applies where the data has no such column."""
    takes_all: bool
    """Whether it has ``**kwargs``."""
    reserved: frozenset[str]
    """Parameters with another meaning: the two positional ones and ``details``."""

    @classmethod
    def of(cls, reward: Any) -> ColumnParameters:
        """Read the signature of a reward; one in C that hides it receives no columns."""
        try:
            parameters = list(inspect.signature(reward).parameters.values())
        except (TypeError, ValueError):
            return cls(frozenset(), frozenset(), False, frozenset())
        kinds = inspect.Parameter
        positional = [p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        reserved = {*positional[:_NUM_POSITIONAL], "details"}
        others = [p for p in parameters if p.name not in reserved and p.kind is not kinds.POSITIONAL_ONLY]
        named = {p.name: p for p in others if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)}
        required = frozenset(name for name, p in named.items() if p.default is kinds.empty)
        takes_all = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
        return cls(required, frozenset(named) - required, takes_all, frozenset(reserved))

    @property
    def named(self) -> frozenset[str]:
        """The columns that the reward names."""
        return self.required | self.optional

    def require(self, columns: Collection[str], where: str, known: Collection[str] = ()) -> None:
        """Check a reward against the columns of the data; ``where`` begins the messages, which list the known columns.

        Raises:
            UserError: the data lacks a column without a default, or ``**kwargs`` would receive a column under the name
                of another argument.
        """
        for name in sorted(self.required.difference(columns)):
            names = known or columns
            listed = did_you_mean(name, names).replace("Known here:", "Its columns are") if names else "It has none"
            raise UserError(
                f"{where} needs the column {name!r}, which the data lacks. {listed}. Rename the parameter, or give it "
                "a default."
            )
        clashes = self.reserved.intersection(columns) if self.takes_all else ()
        for name in sorted(clashes):
            raise UserError(
                f"{where} has the argument {name!r}, and the data has a column of this name. Rename either, or name "
                "the columns that the reward needs in place of **kwargs."
            )

    def values(self, details: Sequence[Details]) -> dict[str, list[Any]]:
        """The columns that the reward receives, each with one value per completion; None where a row has none."""
        rows = [detail.problem.columns or {} for detail in details]
        present = {name for row in rows for name in row}
        given = self.required | (present - self.reserved if self.takes_all else present & self.optional)
        return {name: [row.get(name) for row in rows] for name in sorted(given)}

    def summary(self, columns: Collection[str]) -> str:
        """The columns that the reward receives, and its parameters that keep their defaults; empty without any."""
        given = sorted(name for name in columns if self.takes_all or name in self.named)
        kept = sorted(self.optional.difference(columns))
        receives = f"receives the columns {', '.join(given)}" if given else ""
        defaults = f"has no column for {', '.join(kept)}, which keeps its default" if kept else ""
        return " and ".join(filter(None, (receives, defaults)))
