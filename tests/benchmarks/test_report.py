"""Tables, files and plots of hand-written results."""

import csv
import gzip
from argparse import Namespace

import numpy as np
import pytest
import yaml

from comparison import curves, report
from comparison.plan import AFTER_SFT, Run
from egspo_lightning.errors import UserError
from tune_learning_rates import _write as write_rates
from tune_learning_rates import best_rate, mean_accuracy


def result(correct, **values):
    return {
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
    return {
        Run(AFTER_SFT, None, 1): result([0, 0, 0, 1]),
        Run(AFTER_SFT, None, 2): result([0, 0, 0, 1]),
        Run("grpo", "grpo", 1): result([0, 0, 1, 1], **method, gate_seconds=0.0),
        Run("grpo", "grpo", 2): result([0, 0, 1, 1], **method),
        Run("egspo", "egspo", 1): result([0, 1, 1, 1], **method, gate_seconds=1.0),
        Run("egspo", "egspo", 2): result([0, 1, 0, 1], **method | {"wall_seconds": 30.0}, gate_seconds=1.0),
    }


LABELS = [AFTER_SFT, "grpo", "egspo"]


def test_table_of_means_differences_and_shares(results):
    start, grpo, egspo = report.rows(results, LABELS, "grpo")
    assert (start.accuracy.mean, grpo.accuracy.mean, egspo.accuracy.mean) == (0.25, 0.5, 0.625)
    assert grpo.difference is grpo.won is None
    assert (egspo.difference.mean, egspo.won) == (0.125, 0.75)
    assert (start.difference.mean, start.won) == (-0.25, 0.0)
    assert (egspo.wall_seconds, egspo.gate_share) == (20.0, 2.0 / 40.0)
    assert grpo.gate_share is None  # unknown for one of the seeds
    lines = report.table([start, grpo, egspo], "grpo").splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[4].startswith("| egspo | 2 | 0.625 |")
    assert "| +0.125 |" in lines[4]
    assert lines[4].endswith("| 75 % | 20 s | 5 % |")


def test_pairs_need_seeds_that_both_methods_have_finished(results):
    del results[Run("grpo", "grpo", 2)]
    egspo = report.rows(results, LABELS, "grpo")[2]
    assert (egspo.num_seeds, egspo.accuracy.mean) == (2, 0.625)
    assert (egspo.difference.mean, egspo.won) == (0.25, 1.0)


def test_other_checkpoints_or_problems_are_refused(results):
    results[Run("egspo", "egspo", 2)]["checkpoint"] = "xyz"
    with pytest.raises(UserError, match="seed 2 started from different SFT checkpoints"):
        report.rows(results, LABELS, "grpo")
    results[Run("egspo", "egspo", 2)]["problems"] = {"other": 1.0}
    with pytest.raises(UserError, match="different problems"):
        report.rows(results, LABELS, "grpo")


def test_the_footer_names_unequal_counts(results):
    text = report.footer(results, "python compare.py")
    assert "Unequal number" not in text
    assert "Command: `python compare.py`" in text
    assert "Processor: a CPU, 2 cores" in text
    results[Run("egspo", "egspo", 1)]["optimizer_steps"] = 17
    results[Run("egspo", "egspo", 1)]["machine"] = {"processor": "another", "versions": "torch 2", "revision": "123"}
    text = report.footer(results, "")
    assert "Unequal number of optimizer steps: grpo 16, egspo 16 to 17." in text
    assert "Processor: a CPU, 2 cores (5 runs); another (1 runs)" in text


def test_files_have_one_row_per_run_and_per_problem(results, tmp_path):
    report.write_results(results, tmp_path / "results.csv")
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
    report.write_problems(results, tmp_path / "problems.csv.gz")
    with gzip.open(tmp_path / "problems.csv.gz", "rt", newline="") as file:
        problems = list(csv.reader(file))
    assert len(problems) == 1 + 6 * 4
    assert problems[-1] == ["egspo", "2", "p3", "1"]


def test_curves_are_interpolated_and_drawn(results, tmp_path):
    phases, scores = curves.on_one_grid([[(0.0, 0.0), (2.0, 1.0)], [(0.0, 1.0), (1.0, 0.0), (3.0, 0.0)]])
    assert (phases[0], phases[-1], scores.shape) == (0.0, 2.0, (2, len(phases)))
    np.testing.assert_allclose(scores[0], phases / 2)
    np.testing.assert_allclose(scores[1], np.maximum(1 - phases, 0))
    curves.draw(results, ["grpo", "egspo"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_rate_is_written_with_a_warning_at_the_edge_of_the_grid(tmp_path, capsys):
    scores = {1e-4: (0.5, 0.7), 2e-4: (0.7, 0.7), 4e-4: (0.7, 0.7)}
    results = {
        Run(f"grpo@{rate:g}", "grpo", seed, rate): {"accuracy": value}
        for rate, values in scores.items()
        for seed, value in enumerate(values)
    }
    means = mean_accuracy(results | {Run(AFTER_SFT, None, 0): {"accuracy": 1.0}})
    assert means == {"grpo": {1e-4: pytest.approx(0.6), 2e-4: pytest.approx(0.7), 4e-4: pytest.approx(0.7)}}
    assert best_rate(means["grpo"]) == 2e-4
    write_rates({"egspo": {1e-4: 0.5, 2e-4: 0.4, 4e-4: 0.3}, **means}, Namespace(), tmp_path)
    assert yaml.safe_load((tmp_path / "learning_rates.yaml").read_text()) == {"egspo": 1e-4, "grpo": 2e-4}
    output = capsys.readouterr().out
    assert "egspo: the best rate 0.0001 is at the edge of the grid" in output
    assert "grpo: the best" not in output


def test_a_curve_starts_at_the_checkpoint(results):
    run = Run("sft", "sft", 1)
    results[run] = result([0, 0, 1, 1], curve=[(3.0, 0.5), (6.0, 0.5)])
    assert curves._from_checkpoint(run, results) == [(0.0, 0.25), (3.0, 0.5), (6.0, 0.5)]
    assert curves._from_checkpoint(Run("grpo", "grpo", 1), results) == [(0.0, 0.25), (4.0, 0.5)]
