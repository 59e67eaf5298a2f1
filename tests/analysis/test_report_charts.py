"""Charts, tables and completions of the report, before they are in a page."""

import math

import numpy as np
import pandas as pd
import pytest

from egspo_lightning.analysis.interval_estimates import accuracy_interval
from egspo_lightning.analysis.report_charts import RUN_COLORS, charts
from egspo_lightning.analysis.report_completions import completions_data, spread
from egspo_lightning.analysis.report_tables import differing_settings, facts, scores
from egspo_lightning.analysis.run_reading import Run

CONFIG = {
    "seed_everything": 3,
    "model": {
        "method": "egspo",
        "policy": {"name_or_path": "org/model", "from_scratch": False},
        "gate": {"class_path": "egspo_lightning.QuantileGate", "init_args": {"top_fraction": 0.2}},
    },
    "data": {"problems": {"class_path": "egspo_lightning.DatasetProblems", "init_args": {"path": "org/rows"}},
             "num_problems": 4, "num_generations": 8},
    "trainer": {"default_root_dir": "here"},
}  # fmt: skip


def score(step: int, accuracy: float, n: int = 1, name: str = "held") -> dict:
    metrics = {f"avg@{n}": accuracy, f"avg@{n}_se": 0.05, "num_problems": 100.0}
    return {"step": step, "epoch": 0, "benchmarks": [{"benchmark": name, "num_samples": n, "metrics": metrics}]}


def run_of(tmp_path, name="one", *, gate=True, **parts) -> Run:
    """Two SFT phases of ten optimizer steps, then four rollout batches of two."""
    steps = [10, 20, 22, 24, 26, 28]
    phases = pd.DataFrame({"steps": steps, "batches": [math.nan, math.nan, 1, 2, 3, 4]})
    is_rollout = phases["batches"].notna()
    phases["loss/sft"] = [2.0, 1.0, 0.9, 0.8, 0.7, 0.6]
    for metric, value in {"rollout/reward_mean": 0.25, "policy/entropy": 0.5, "policy/entropy_low": 0.1}.items():
        phases[metric] = np.where(is_rollout, value, math.nan)
    if gate:
        phases["gate/threshold"] = np.where(is_rollout, 1.5, math.nan)
        phases["gate/high_weight_fraction"] = np.where(is_rollout, 0.9, math.nan)
    found = [score(0, 0.1), score(20, 0.4), score(28, 0.8)]
    empty = pd.DataFrame()
    return Run(name, tmp_path, CONFIG, phases, found, empty, empty)._replace(**parts)


def by_title(runs) -> dict[str, dict]:
    return {chart["title"]: chart for chart in charts(runs)}


def test_charts_are_over_optimizer_steps_and_over_rollout_batches(tmp_path):
    found = by_title([run_of(tmp_path)])
    (reward,) = found["Reward"]["figure"]["data"]
    assert (list(reward["x"]), list(reward["y"])) == ([22, 24, 26, 28], [0.25] * 4)
    assert reward["meta"] == {"run": 0, "batches": [1, 2, 3, 4]}
    (loss,) = found["SFT loss"]["figure"]["data"]
    assert loss["meta"]["batches"] == [None, None, 1, 2, 3, 4]
    (accuracy,) = found["Accuracy on held"]["figure"]["data"]
    assert (list(accuracy["x"]), list(accuracy["y"])) == ([0, 20, 28], [0.1, 0.4, 0.8])
    assert accuracy["meta"]["batches"] == [None, 0, 4]
    low, up = accuracy["customdata"][1]
    assert (low, up) == pytest.approx((0.3094, 0.498), abs=1e-4)
    assert accuracy["error_y"]["array"][1] == pytest.approx(up - 0.4, abs=1e-4)
    assert list(found)[:2] == ["Reward", "Accuracy on held"]


def test_stage_transition_is_marked_in_each_chart(tmp_path):
    for chart in charts([run_of(tmp_path)]):
        (mark,) = chart["figure"]["layout"]["shapes"]
        assert (mark["x0"], mark["x1"], mark["label"]["text"]) == (20, 20, "end of SFT")
    only_rl = run_of(tmp_path)
    only_rl = only_rl._replace(phases=only_rl.phases[2:])
    assert not charts([only_rl])[0]["figure"]["layout"].get("shapes")


def test_weights_of_both_branches_are_shares_of_one(tmp_path):
    chart = by_title([run_of(tmp_path)])["Weight held by high and low tokens"]
    high, low = chart["figure"]["data"]
    assert list(high["y"]) == [0.9] * 4
    assert list(low["y"]) == pytest.approx([0.1] * 4)
    assert [line["label"] for line in chart["lines"]] == ["high", "low"]


def test_open_gate_has_no_branches(tmp_path):
    found = by_title([run_of(tmp_path, gate=False)])
    assert "Threshold tau" not in found
    assert "Weight held by high and low tokens" not in found
    assert [trace["name"] for trace in found["Entropy"]["figure"]["data"]] == ["one, all tokens"]


def test_runs_have_a_color_each_and_escaped_names(tmp_path):
    runs = [run_of(tmp_path, name) for name in ("a", "<a href='x'>b</a>")]
    for chart in charts(runs):
        colors = {trace["meta"]["run"]: trace["line"]["color"] for trace in chart["figure"]["data"]}
        assert colors == {0: RUN_COLORS[0], 1: RUN_COLORS[1]}
        assert not any("<" in trace["name"] for trace in chart["figure"]["data"])
    assert len(set(RUN_COLORS)) == len(RUN_COLORS) == 7


def test_long_runs_are_smoothed_and_thinned_out(tmp_path):
    numbers = np.arange(1, 5001)
    phases = pd.DataFrame({"steps": numbers, "batches": numbers, "rollout/reward_mean": numbers % 2})
    (chart,) = charts([run_of(tmp_path, phases=phases, scores=[])])
    thin, bold = chart["figure"]["data"]
    assert len(thin["x"]) == len(bold["x"]) == 1000
    assert (thin["x"][0], thin["x"][-1]) == (1, 5000)
    assert set(thin["y"]) == {0.0, 1.0}
    assert list(bold["y"]) == pytest.approx([0.5] * 1000, abs=0.02)
    (short,) = charts([run_of(tmp_path, phases=phases[:1], scores=[])])
    assert short["figure"]["data"][0]["mode"] == "markers"


def test_facts_and_scores_of_a_run(tmp_path):
    run = run_of(tmp_path)
    (shown,) = facts([run])
    assert dict(shown["facts"]) == {
        "method": "egspo",
        "model": "org/model",
        "demonstrations": "not recorded",
        "problems": "DatasetProblems (org/rows)",
        "rollout batch": "4 problems with 8 completions each",
        "trained": "28 optimizer steps, 4 rollout batches",
        "seed": "3",
        "folder": str(tmp_path),
    }
    table = scores([run, run_of(tmp_path, "two", scores=[score(20, 0.4)])])
    assert table.head == ["benchmark", "run", "problems", "metric", "start", "after SFT", "end"]
    assert table.rows[0][:4] == ["held", "one", "100", "avg@1"]
    assert table.rows[0][5:] == ["0.400 (0.309 to 0.498)", "0.800 (0.711 to 0.867)"]
    assert table.rows[1][4:] == ["0.400 (0.309 to 0.498)", "0.400 (0.309 to 0.498)", "-"]
    assert scores([run_of(tmp_path, scores=[])]) is None


def test_settings_that_differ_are_listed(tmp_path):
    other = CONFIG | {"model": CONFIG["model"] | {"method": "grpo", "gate": {"class_path": "egspo_lightning.OpenGate"}}}
    other |= {"trainer": {"default_root_dir": "there"}}
    table = differing_settings([run_of(tmp_path, "a"), run_of(tmp_path, "b", config=other)])
    assert table.head == ["setting", "a", "b"]
    assert table.rows == [
        ["model.method", "egspo", "grpo"],
        ["model.gate", "QuantileGate", "OpenGate"],
        ["model.gate.top_fraction", "0.2", ""],
    ]
    assert differing_settings([run_of(tmp_path)]) is None


def test_accuracy_intervals_by_hand():
    one = {"avg@1": 0.0, "avg@1_se": 0.0, "num_problems": 96.0}
    z = 1.959964**2
    assert accuracy_interval(one, 1) == pytest.approx((0.0, 0.0, z / (96 + z)), abs=1e-9)
    several = {"avg@4": 0.95, "avg@4_se": 0.04, "num_problems": 30.0}
    assert accuracy_interval(several, 4) == pytest.approx((0.95, 0.95 - 1.959964 * 0.04, 1.0))
    assert math.isnan(accuracy_interval({"avg@2": 0.5, "num_problems": 1.0}, 2)[1])


def completions(num_batches: int, num_problems: int = 2, size: int = 4, length: int = 10) -> pd.DataFrame:
    rows = [(b, f"p{p}", f"{b}/0/{p * size + i}") for b in range(num_batches) for p in range(num_problems)
            for i in range(size)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["rollout_batch", "problem_id", "completion_id"])
    return frame.assign(length=length)


def test_completions_are_spread_evenly_over_training_in_whole_groups():
    frame = completions(num_batches=100)
    assert len(spread(frame, 800, 10**9)) == 800
    for limits in ((80, 10**9), (10**9, 800)):
        chosen = spread(frame, *limits)
        assert 64 <= len(chosen) <= 80
        assert set(chosen.groupby(["rollout_batch", "problem_id"]).size()) == {4}
        gaps = np.diff(sorted(chosen["rollout_batch"].unique()))
        assert (chosen["rollout_batch"].min(), chosen["rollout_batch"].max()) == (0, 99)
        assert gaps.max() <= gaps.min() + 2
    assert len(spread(frame, 1, 1)) == 4  # a group is never torn


def test_run_without_records_has_no_completions(tmp_path):
    assert completions_data([run_of(tmp_path)], 100) is None
