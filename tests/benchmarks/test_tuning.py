"""Choice of learning rates."""

from argparse import Namespace

import pytest
import yaml

from egspo_lightning.cli.comparison.compared_runs import AFTER_SFT, Run
from tune_learning_rates import _write as write_rates
from tune_learning_rates import best_rate, mean_accuracy


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
