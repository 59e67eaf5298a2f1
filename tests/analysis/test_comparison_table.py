"""Tables, files and plots of hand-written results."""

import csv
import gzip

import numpy as np
import pytest

from egspo_lightning.analysis.comparison_curves import _from_checkpoint, common_points, learning_curves
from egspo_lightning.analysis.comparison_table import (
    AFTER_SFT,
    caution,
    table_cells,
    table_page,
    table_rows,
    write_problems,
    write_results,
)
from egspo_lightning.analysis.paired_bootstrap import Duels
from egspo_lightning.errors import UserError


def result(label, seed, correct, **values):
    return {
        "label": label,
        "seed": seed,
        "accuracy": sum(correct) / len(correct),
        "problems": {f"p{i}": value for i, value in enumerate(correct)},
        "benchmark": "sums",
        "wall_seconds": 10.0,
        "checkpoint": "abc",
        "machine": {"processor": "a CPU, 2 cores", "versions": "torch 2", "revision": "123"},
        "finished": "2026-01-01 00:00:00",
        **values,
    }


@pytest.fixture
def results():
    """Two seeds: EGSPO wins the first and ties the second."""
    method = {"optimizer_steps": 16, "rollout_batches": 4, "learning_rate": 1e-4, "curve": [(0.0, 0.25), (4.0, 0.5)]}
    return [
        result(AFTER_SFT, 1, [0, 0, 0, 1]),
        result(AFTER_SFT, 2, [0, 0, 0, 1]),
        result("grpo", 1, [0, 0, 1, 1], **method, gate_seconds=0.0),
        result("grpo", 2, [0, 0, 1, 1], **method),
        result("egspo", 1, [0, 1, 1, 1], **method, gate_seconds=1.0),
        result("egspo", 2, [0, 1, 0, 1], **method | {"wall_seconds": 30.0}, gate_seconds=1.0),
    ]


LABELS = [AFTER_SFT, "grpo", "egspo"]


def test_table_of_means_differences_and_seeds_won(results):
    start, grpo, egspo = table_rows(results, LABELS, "grpo")
    assert (start.accuracy.mean, grpo.accuracy.mean, egspo.accuracy.mean) == (0.25, 0.5, 0.625)
    assert grpo.difference is grpo.duels is None
    assert (egspo.difference.mean, egspo.duels) == (0.125, Duels(1, 1, 2))
    assert (start.difference.mean, start.duels) == (-0.25, Duels(0, 0, 2))
    assert (egspo.wall_seconds, egspo.gate_share) == (20.0, 2.0 / 40.0)
    assert grpo.gate_share is None  # unknown for one of the seeds
    header, cells = table_cells([start, grpo, egspo], "grpo")
    assert header[4] == "minus grpo"
    assert cells[2][:3] == ("egspo", "2", "0.625")
    assert cells[2][4] == "+0.125"
    assert cells[2][6:] == ("1 of 2, 1 tied", "20 s", "5 %")
    assert cells[0][6] == "0 of 2"
    assert set(cells[1][4:7]) == {"–"}


def test_pairs_need_seeds_that_both_methods_have_finished(results):
    del results[3]
    egspo = table_rows(results, LABELS, "grpo")[2]
    assert (egspo.num_seeds, egspo.accuracy.mean) == (2, 0.625)
    assert (egspo.difference.mean, egspo.duels) == (0.25, Duels(1, 0, 1))
    without_grpo = table_rows([r for r in results if r["label"] != "grpo"], LABELS, "grpo")
    assert [row.label for row in without_grpo] == [AFTER_SFT, "egspo"]
    assert {row.difference for row in without_grpo} == {None}


def test_few_seeds_are_cautioned(results):
    (row,) = table_rows(results, ["egspo"], "egspo")
    assert caution([row]).startswith("Intervals over 2 seeds are too narrow")
    assert caution([row._replace(num_seeds=1)]).startswith("Intervals over one seed cover the problems only")
    assert caution([row._replace(num_seeds=5)]) == ""


def test_other_checkpoints_or_problems_are_refused(results):
    results[5]["checkpoint"] = "xyz"
    with pytest.raises(UserError, match="seed 2 started from different SFT checkpoints"):
        table_rows(results, LABELS, "grpo")
    results[5]["problems"] = {"other": 1.0}
    with pytest.raises(UserError, match="different problems"):
        table_rows(results, LABELS, "grpo")


def test_the_page_names_unequal_counts(results):
    rows = table_rows(results, LABELS, "grpo")
    text = table_page(results, rows, "grpo", "python compare.py")
    assert text.startswith("| method | seeds |")
    assert "Unequal number" not in text
    assert "Command: `python compare.py`" in text
    assert "Processor: a CPU, 2 cores" in text
    results[4]["optimizer_steps"] = 17
    results[4]["machine"] = {"processor": "another", "versions": "torch 2", "revision": "123"}
    text = table_page(results, rows, "grpo", "")
    assert "Unequal number of optimizer steps: grpo 16, egspo 16 to 17." in text
    assert "Processor: a CPU, 2 cores (5 runs); another (1 runs)" in text


def test_files_have_one_row_per_run_and_per_problem(results, tmp_path):
    write_results(results, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    expected = {
        "method": "egspo",
        "seed": "1",
        "accuracy": "0.75",
        "after_sft_accuracy": "0.25",
        "optimizer_steps": "16",
    }
    assert {name: rows[4][name] for name in expected} == expected
    write_problems(results, tmp_path / "problems.csv.gz")
    with gzip.open(tmp_path / "problems.csv.gz", "rt", newline="") as file:
        problems = list(csv.reader(file))
    assert len(problems) == 1 + 6 * 4
    assert problems[-1] == ["egspo", "2", "p3", "1"]


def test_values_between_two_evaluations_enter_no_mean():
    curves = [[(0.0, 0.0), (2.0, 1.0), (4.0, 0.5)], [(0.0, 1.0), (1.0, 0.0), (4.0, 0.0)]]
    phases, scores = common_points(curves)
    np.testing.assert_array_equal(phases, [0.0, 4.0])
    np.testing.assert_array_equal(scores, [[0.0, 0.5], [1.0, 0.0]])


def drawn(num_seeds):
    """Axes of one method's curves."""
    curve = [(0.0, 0.25), (2.0, 0.5), (4.0, 0.5)]
    runs = [result("grpo", seed, [0, 1], curve=[*curve[:2], (4.0, seed / 10)]) for seed in range(num_seeds)]
    return learning_curves(runs, ["grpo", "absent"]).axes[0]


def test_a_band_needs_five_seeds_and_fewer_are_drawn_one_by_one():
    assert "from 5 seeds on" in drawn(1).get_title()
    assert (len(drawn(1).lines), len(drawn(1).collections)) == (1, 0)
    assert (len(drawn(2).lines), len(drawn(2).collections)) == (1 + 2, 0)  # the mean and each seed
    assert (len(drawn(4).lines), len(drawn(4).collections)) == (1 + 4, 0)
    assert (len(drawn(5).lines), len(drawn(5).collections)) == (1, 1)
    mean = drawn(2).lines[0]
    np.testing.assert_allclose(mean.get_xydata(), [(0.0, 0.25), (2.0, 0.5), (4.0, 0.05)])


def test_the_figure_is_written(results, tmp_path):
    learning_curves(results, ["grpo", "egspo"]).savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_starts_at_the_checkpoint(results):
    late = result("sft", 1, [0, 0, 1, 1], curve=[(3.0, 0.5), (6.0, 0.5)])
    assert _from_checkpoint(late, results) == [(0.0, 0.25), (3.0, 0.5), (6.0, 0.5)]
    assert _from_checkpoint(results[2], results) == [(0.0, 0.25), (4.0, 0.5)]
