"""Plots: the plotted numbers, read back from the axes."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt

from egspo_lightning.analysis import token_plots, training_plots
from egspo_lightning.analysis.plot_axes import side_by_side
from egspo_lightning.errors import UserError


@pytest.fixture(autouse=True)
def no_windows():
    mpl.use("Agg")
    yield
    plt.close("all")


UNITS = ("nats", "number", "tokens", "%", "ratio", "token sampled")


def line(ax, label):
    return next(drawn for drawn in ax.get_lines() if drawn.get_label() == label)


def every_plot(records):
    """Every plot for a single run, by name."""
    tokens, completions, metrics = records
    one = {
        "entropy_heatmap": lambda: training_plots.entropy_heatmap(tokens),
        "threshold_curve": lambda: training_plots.threshold_curve(tokens),
        "high_share_curve": lambda: training_plots.high_share_curve(tokens),
        "weight_mass": lambda: training_plots.weight_mass(tokens),
        "metric_curves": lambda: training_plots.metric_curves(metrics, "policy/entropy", unit="nats"),
        "accuracy_against_entropy": lambda: training_plots.accuracy_against_entropy(metrics, window=1),
        "entropy_by_position": lambda: token_plots.entropy_by_position(tokens),
        "entropy_by_token": lambda: token_plots.entropy_by_token(tokens, min_count=2),
        "entropy_by_correctness": lambda: token_plots.entropy_by_correctness(tokens, completions),
        "entropy_before_after": lambda: token_plots.entropy_before_after(tokens),
        "ratio_by_entropy": lambda: token_plots.ratio_by_entropy(tokens),
    }
    return {name: draw() for name, draw in one.items()}


def test_every_plot_returns_labeled_axes_with_units(records, recwarn):
    for name, ax in every_plot(records).items():
        ax.figure.canvas.draw()
        x, y = ax.get_xlabel(), ax.get_ylabel()
        assert ax.get_title(), name
        for label in (x, y):
            assert any(unit in label for unit in UNITS), (
                name,
                label,
            )
    assert not [w for w in recwarn if "glyph" not in str(w.message).lower() and "egspo" in w.filename]


def test_plots_draw_on_the_given_axes(records):
    _, ax = plt.subplots()
    assert training_plots.threshold_curve(records.tokens, ax=ax) is ax
    assert token_plots.entropy_by_position(records.tokens, ax=ax) is ax


def test_entropy_heatmap_shows_share_of_tokens_per_bin(records):
    tokens = records.tokens
    ax = training_plots.entropy_heatmap(tokens, bins=8)
    shares = ax.collections[0].get_array().filled(0.0)  # (bins, collections)
    assert shares.shape == (8, 3)
    assert shares.sum(0) == pytest.approx(1.0)
    top = tokens["entropy"].quantile(0.995)
    first = tokens[tokens["rollout_batch"] == 0]["entropy"]
    assert shares[0, 0] == pytest.approx((first < top / 8).mean())
    assert shares[7, 0] == pytest.approx((first >= top * 7 / 8).mean())
    taus = tokens.groupby("rollout_batch")["threshold"].first()
    assert line(ax, "threshold tau").get_ydata().tolist() == pytest.approx(taus.tolist())


def test_training_curves_match_the_records(two_runs):
    tokens = two_runs.tokens
    gated = tokens[tokens["run"] == "gated"].groupby("rollout_batch")
    ax = training_plots.threshold_curve(tokens)
    assert [drawn.get_label() for drawn in ax.get_lines()] == ["gated"]  # an open gate has no threshold
    assert line(ax, "gated").get_ydata().tolist() == pytest.approx(gated["threshold"].first().tolist())
    ax = training_plots.high_share_curve(tokens)
    found = {box.get_label(): box.lines[0].get_ydata() for box in ax.containers}
    assert found["gated"] == pytest.approx((100 * gated["is_high_entropy"].mean()).tolist())
    assert found["open"] == pytest.approx([100.0] * 3)


def test_weight_mass_splits_weight_between_high_and_low_tokens(records):
    tokens = records.tokens
    ax = training_plots.weight_mass(tokens)
    high = tokens[tokens["is_high_entropy"]].groupby("rollout_batch")["token_weight"].sum()
    expected = 100 * high / tokens.groupby("rollout_batch")["token_weight"].sum()
    vertices = ax.collections[0].get_paths()[0].vertices
    tops = [vertices[vertices[:, 0] == number, 1].max() for number in (0, 1, 2)]
    assert tops == pytest.approx(expected.tolist())
    assert ax.collections[0].get_label() == "high tokens"


def test_weight_mass_with_open_gate_is_all_on_high_tokens(two_runs):
    ax = training_plots.weight_mass(two_runs.tokens[two_runs.tokens["run"] == "open"])
    assert ax.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(100.0)


def test_accuracy_is_plotted_against_entropy(records):
    ax = training_plots.accuracy_against_entropy(records.metrics, window=1)
    rows = records.metrics.dropna(subset=["rollout/accuracy"])
    x, y = line(ax, "gated").get_data()
    assert (x.tolist(), y.tolist()) == (rows["policy/entropy"].tolist(), (100 * rows["rollout/accuracy"]).tolist())


def test_metric_curves_smooth_over_the_window(records):
    values = records.metrics["policy/entropy"].dropna().to_numpy()
    ax = training_plots.metric_curves(records.metrics, "policy/entropy", unit="nats", window=2)
    assert line(ax, "gated").get_ydata() == pytest.approx([values[0], values[:2].mean(), values[1:3].mean()])


def test_entropy_by_position_is_the_mean_over_completions(records):
    tokens = records.tokens
    ax = token_plots.entropy_by_position(tokens, min_count=40)
    counts = tokens.groupby("position").size()
    x, y = line(ax, "gated, mean").get_data()
    assert x.tolist() == counts[counts >= 40].index.tolist()
    assert y[0] == pytest.approx(tokens[tokens["position"] == 0]["entropy"].mean())


def test_entropy_by_token_labels_counts_and_orders_tokens(records):
    tokens = records.tokens.assign(token=np.where(records.tokens["position"] == 0, "\0 $x^$", "b"), entropy=1.0)
    tokens.loc[tokens["token"] == "b", "entropy"] = 2.0
    ax = token_plots.entropy_by_token(tokens, min_count=1)
    count = (tokens["token"] == "b").sum()
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"b   n = {count}", "\u2400\u2423$x^$   n = 48"]
    ax.figure.canvas.draw()  # the label is plain text: as math text it would fail to parse
    by_count = token_plots.entropy_by_token(records.tokens, top=3, order="count", min_count=1)
    first = records.tokens["token"].value_counts().max()
    assert by_count.get_yticklabels()[0].get_text().endswith(f"n = {first}")
    assert len(by_count.get_yticklabels()) == 3


def test_entropy_by_correctness_separates_right_and_wrong_completions(records):
    completions = records.completions.assign(is_correct=records.completions.index % 2 == 0)
    right = set(completions[completions["is_correct"]]["completion_id"])
    ax = token_plots.entropy_by_correctness(records.tokens, completions)
    mean = records.tokens[records.tokens["completion_id"].isin(right)]["entropy"].mean()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[0] == f"right: 24 completions, mean {mean:.3f}"
    assert labels[1].startswith("wrong: 24 completions")
    for patch in ax.patches:
        assert patch.get_data().values.sum() == pytest.approx(100.0)


def test_entropy_before_after_counts_every_token_once(records):
    ax = token_plots.entropy_before_after(records.tokens, bins=10)
    counts = ax.collections[0].get_array().filled(0)
    assert counts.sum() == len(records.tokens)
    same = token_plots.entropy_before_after(records.tokens.assign(entropy_after=records.tokens["entropy"]), bins=10)
    counts = same.collections[0].get_array().filled(0)
    assert np.trace(counts) == counts.sum()
    more = token_plots.entropy_before_after(records.tokens.assign(entropy_after=0.0), bins=10)
    lowest = more.collections[0].get_array().filled(0)[0]  # the y axis is the entropy after the update
    assert lowest.sum() == len(records.tokens)


def test_ratio_by_entropy_shows_medians_by_sign_of_advantage(records):
    tokens = records.tokens
    ax = token_plots.ratio_by_entropy(tokens, bins=1)
    for sign, label in ((1, "A > 0, median"), (-1, "A < 0, median")):
        rows = tokens[np.sign(tokens["advantage"]) == sign]
        x, y = line(ax, label).get_data()
        assert (x[0], y[0]) == pytest.approx((rows["entropy"].median(), rows["ratio"].median()))


def test_side_by_side_plots_share_one_scale(two_runs):
    axes = side_by_side(token_plots.entropy_before_after, two_runs.tokens, bins=5)
    assert [ax.get_title() for ax in axes] == ["gated", "open"]
    totals = [ax.collections[0].get_array().filled(0).sum() for ax in axes]
    assert totals == two_runs.tokens.groupby("run").size().tolist()
    assert axes[0].get_xlim() == axes[1].get_xlim()
    axes = side_by_side(token_plots.entropy_by_correctness, two_runs.tokens, two_runs.completions)
    assert len(axes) == 2


def test_single_run_plots_refuse_two_runs(two_runs):
    with pytest.raises(UserError, match=r"entropy_heatmap draws one run, got gated, open\. Use side_by_side"):
        training_plots.entropy_heatmap(two_runs.tokens)


def test_unsuitable_frames_are_refused(records):
    with pytest.raises(UserError, match="entropy_by_position: the frame has no rows"):
        token_plots.entropy_by_position(records.tokens[:0])
    with pytest.raises(UserError, match="metric_curves needs the columns loss/none"):
        training_plots.metric_curves(records.metrics, "loss/none", unit="")
    with pytest.raises(UserError, match="no token was sampled 100000 times"):
        token_plots.entropy_by_token(records.tokens, min_count=100_000)
