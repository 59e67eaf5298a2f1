"""95 % confidence intervals: of means over tokens, clustered by completion, and of benchmark accuracies."""

from collections.abc import Mapping

import pandas as pd

NORMAL_95 = 1.959964
"""Half width of a normal distribution's central 95 %, in standard deviations."""


def means(frame: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """Mean of ``value`` over the tokens of each group, with the half width of its 95 % interval.

    Tokens of one completion are not independent, so completions are the sampling units. With ``s_i`` the sum and
    ``n_i`` the number of a group's tokens in completion i, and m completions that have any:

        mean = sum s_i / sum n_i        half = 1.96 sqrt( m / (m - 1) sum (s_i - mean n_i)^2 ) / sum n_i

    This is the ratio estimator with linearized variance (Cochran, Sampling Techniques, section 6.3). It is too narrow
    for few completions, and NaN for one.

    Args:
        frame: a frame with ``run``, ``completion_id`` and the columns named below
        by: columns that make the groups
        value: the column to average

    Returns:
        a frame indexed by group, with ``mean``, ``half_width`` and ``count`` (tokens)
    """
    keys = [*by, *(name for name in ("run", "completion_id") if name not in by)]
    grouped = frame.groupby(keys, observed=True)[value]
    clusters = pd.DataFrame({"sum": grouped.sum().astype(float), "count": grouped.size()})
    levels, rest = list(range(len(by))), list(range(len(by), len(keys)))
    totals = clusters.groupby(level=levels).sum()
    mean = totals["sum"] / totals["count"]
    residuals = clusters["sum"] - clusters["count"] * mean.reindex(clusters.index.droplevel(rest)).to_numpy()
    num_completions = residuals.groupby(level=levels).size()
    variance = (residuals**2).groupby(level=levels).sum() * num_completions / (num_completions - 1)
    half = NORMAL_95 * variance**0.5 / totals["count"]
    return pd.DataFrame({"mean": mean, "half_width": half, "count": totals["count"]})


def accuracy_interval(metrics: Mapping[str, float], num_samples: int) -> tuple[float, float, float]:
    """Accuracy avg@n of a benchmark, with the lower and upper end of its 95 % interval.

    Of one sample per problem it is the Wilson score interval, which is sound at 0 and 1, too. Of several it is
    1.96 standard errors over problems, cut at 0 and 1.

    Args:
        metrics: the metrics of one benchmark, as in ``benchmarks.jsonl``
        num_samples: n
    """
    mean, count = metrics[f"avg@{num_samples}"], metrics["num_problems"]
    if num_samples == 1 and count > 0:
        z = NORMAL_95**2 / count
        middle = (mean + z / 2) / (1 + z)
        half = (mean * (1 - mean) * z + z**2 / 4) ** 0.5 / (1 + z)
        return mean, max(middle - half, 0.0), min(middle + half, 1.0)
    half = NORMAL_95 * metrics.get(f"avg@{num_samples}_se", float("nan"))
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)
