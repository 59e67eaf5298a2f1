"""Completions of the report as compact columns: groups spread evenly over training, and one color scale."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from egspo_lightning.analysis.rounding import rounded
from egspo_lightning.analysis.run_reading import Run
from egspo_lightning.analysis.token_text import shown

MAX_TOKENS = 240_000
"""Tokens of a page; their values take up to 22 bytes each, so the page stays below 8 MB."""
DIGITS = 3
"""Significant digits of a token's values."""
GROUP = ["rollout_batch", "problem_id"]
VALUES = ("entropy", "old_logprob", "phi", "token_weight", "advantage", "ratio", "entropy_after")
COLORS = ("entropy", "phi", "token_weight", "advantage")
"""Values that tokens can be colored by."""


def completions_data(runs: Sequence[Run], max_completions: int) -> dict[str, Any] | None:
    """Columns of the completions and tokens of all runs; None if no run has token records.

    The completions of a problem in a rollout batch stay together. If there are more than ``max_completions``, or more
    than ``MAX_TOKENS`` tokens, each run keeps groups at equal distances.
    """
    recorded = [(number, run) for number, run in enumerate(runs) if not run.completions.empty]
    if not recorded:
        return None
    limits = max(max_completions // len(recorded), 1), MAX_TOKENS // len(recorded)
    parts = [(number, run, spread(run.completions, *limits)) for number, run in recorded]
    completions = pd.concat([chosen.assign(run=number) for number, _, chosen in parts], ignore_index=True)
    keys = ["run", "completion_id"]
    order = completions[keys].assign(row=np.arange(len(completions)))
    tokens = pd.concat([run.tokens.assign(run=number) for number, run, _ in parts], ignore_index=True)
    tokens = tokens.merge(order, on=keys).sort_values(["row", "position"], kind="stable")
    texts, problems = _Numbers(), _Numbers()
    return {
        "recorded": sum(len(run.completions) for _, run in recorded),
        "completions": _completion_columns(completions, tokens, problems),
        "tokens": _token_columns(tokens, texts),
        "texts": texts.values(),
        "problems": problems.values(),
        "scales": {name: _scale(tokens[name]) for name in COLORS},
    }


def spread(completions: pd.DataFrame, max_completions: int, max_tokens: int) -> pd.DataFrame:
    """Whole groups, at equal distances over training, with at most so many completions and tokens; at least one."""
    groups = completions.groupby(GROUP, sort=False)
    sizes = groups["length"].agg(["size", "sum"]).sort_index(level="rollout_batch", sort_remaining=False)
    number = len(sizes)
    while True:
        kept = sizes.iloc[np.unique(np.linspace(0, len(sizes) - 1, number).round().astype(int))]
        excess = max(kept["size"].sum() / max_completions, kept["sum"].sum() / max_tokens)
        if excess <= 1 or number == 1:
            break
        number = max(min(int(number / excess), number - 1), 1)
    order = pd.Series(np.arange(len(kept)), index=kept.index, name="group")
    chosen = completions.join(order, on=GROUP, how="inner")
    return chosen.sort_values("group", kind="stable")


class _Numbers:
    """Numbers texts from 0, so that each is stored once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def of(self, texts: pd.Series) -> list[int]:
        """The number of each text."""
        return [self._numbers.setdefault(text, len(self._numbers)) for text in texts.fillna("")]

    def values(self) -> list[str]:
        """The texts in order, with control characters replaced."""
        return [shown(text) for text in self._numbers]


def _completion_columns(completions: pd.DataFrame, tokens: pd.DataFrame, problems: _Numbers) -> dict[str, list[Any]]:
    lengths = tokens.groupby("row").size().reindex(range(len(completions)), fill_value=0)
    thresholds = tokens.groupby("row")["threshold"].first().reindex(range(len(completions)))
    masked = completions["is_masked"].eq(True) if "is_masked" in completions else pd.Series(False, completions.index)
    return {
        "run": completions["run"].tolist(),
        "batch": completions["rollout_batch"].tolist(),
        "steps": completions["policy_version"].tolist(),
        "problem": problems.of(completions["problem"]),
        "problem_id": [shown(text) for text in completions["problem_id"].fillna("")],
        "id": [shown(text) for text in completions["completion_id"]],
        "gold": [shown(text) for text in completions["gold"].fillna("")],
        "extracted": [None if pd.isna(text) else shown(text) for text in completions["extracted"]],
        "reward": rounded(completions["reward"], DIGITS),
        "right": completions["is_correct"].astype(int).tolist(),
        "truncated": completions["is_truncated"].astype(int).tolist(),
        "masked": masked.astype(int).tolist(),
        "length": lengths.tolist(),
        "threshold": rounded(thresholds, DIGITS),
    }


def _token_columns(tokens: pd.DataFrame, texts: _Numbers) -> dict[str, Any]:
    values: dict[str, Any] = {name: rounded(tokens[name], DIGITS) for name in VALUES}
    high = "".join(tokens["is_high_entropy"].astype(int).astype(str))
    return values | {"text": texts.of(tokens["token"]), "id": tokens["token_id"].tolist(), "high": high}


def _scale(values: pd.Series) -> float:
    """The value of the full color: the 99 % quantile of the magnitudes, or the largest one if that is 0."""
    magnitudes = values[np.isfinite(values)].abs()
    found = [magnitudes.quantile(0.99), magnitudes.max(), 1.0]
    return next(float(f"{value:.2g}") for value in found if value > 0)
