import numpy as np
import pandas as pd
import pytest

from egspo_lightning.analysis.interval_estimates import means


def frame(values: dict[str, list[float]], group="a") -> pd.DataFrame:
    rows = [("r", name, group, value) for name, part in values.items() for value in part]
    return pd.DataFrame(rows, columns=["run", "completion_id", "group", "value"])


def test_mean_and_interval_by_hand():
    # sums 3, 3 and 6 of 2, 1 and 3 tokens: mean 2; residuals -1, 1, 0; variance 3/2 * 2 / 36
    found = means(frame({"x": [1, 2], "y": [3], "z": [1, 2, 3]}), ["group"], "value").loc["a"]
    assert found["mean"] == pytest.approx(2.0)
    assert found["half_width"] == pytest.approx(1.959964 * (3 / 36) ** 0.5)
    assert found["count"] == 6


def test_groups_are_separate_and_one_completion_has_no_interval():
    both = pd.concat([frame({"x": [1, 3]}), frame({"x": [5], "y": [7]}, "b")])
    found = means(both, ["group"], "value")
    assert found["mean"].to_dict() == {"a": 2.0, "b": 6.0}
    assert np.isnan(found.loc["a", "half_width"])
    assert found.loc["b", "half_width"] == pytest.approx(1.959964)


def test_same_completion_id_in_two_runs_counts_twice():
    two = pd.concat([frame({"x": [1.0]}), frame({"x": [3.0]}).assign(run="s")])
    assert means(two, ["group"], "value").loc["a", "half_width"] == pytest.approx(1.959964)
    assert means(two, ["run"], "value")["mean"].to_dict() == {"r": 1.0, "s": 3.0}


def test_intervals_cover_the_true_mean_for_correlated_tokens():
    rng = np.random.default_rng(0)
    values = rng.normal(0.0, 1.0, (200, 40, 1)) + rng.normal(0.0, 0.3, (200, 40, 10))
    index = pd.MultiIndex.from_product([range(n) for n in values.shape], names=["group", "completion_id", "token"])
    found = means(pd.DataFrame({"value": values.ravel()}, index).reset_index().assign(run="r"), ["group"], "value")
    hits = (found["mean"].abs() <= found["half_width"]).sum()
    assert 180 <= hits <= 198  # an interval that assumes independent tokens would cover it about 100 times
