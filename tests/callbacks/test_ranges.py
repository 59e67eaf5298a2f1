"""The parser refuses out-of-range arguments of callbacks by name, before a callback is built."""

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from egspo_lightning import (
    EntropyHistogram,
    Guards,
    MathBenchmark,
    ProbabilityShift,
    RolloutSamples,
    StageTransition,
    TokenRecords,
)

CASES = [
    (StageTransition, "after_epochs", ["0", "-1", "1.5"], "1"),
    (StageTransition, "patience", ["0", "-1"], "1"),
    (StageTransition, "learning_rate", ["-1.0", "0.0", "nan", "inf"], "1e-3"),
    (StageTransition, "mode", ["larger"], "max"),
    (MathBenchmark, "every_n_epochs", ["-1"], "0"),
    (EntropyHistogram, "every_n_rollout_batches", ["-1"], "0"),
    (ProbabilityShift, "every_n_rollout_batches", ["-1"], "0"),
    (ProbabilityShift, "top_fraction", ["-0.1", "1.1"], "0.5"),
    (TokenRecords, "every_n_rollout_batches", ["-1"], "0"),
    (TokenRecords, "max_completions", ["0"], "1"),
    (RolloutSamples, "every_n_rollout_batches", ["-1"], "0"),
    (RolloutSamples, "num_samples", ["0"], "1"),
    (RolloutSamples, "max_characters", ["0"], "1"),
    (Guards, "min_entropy_share", ["1.5", "-0.1", "nan"], "0"),
    (Guards, "max_truncated_fraction", ["-0.1", "1.1"], "1"),
    (Guards, "max_kl", ["0.0", "nan"], "1e9"),
    (Guards, "max_first_ratio_gap", ["0.0"], "0.04"),
    (Guards, "num_zero_rewards", ["0"], "1"),
]


@pytest.mark.parametrize(
    ("callback", "name", "wrong", "right"), CASES, ids=lambda value: getattr(value, "__name__", None)
)
def test_parser_refuses_out_of_range_callback_arguments(callback, name, wrong, right):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(callback, "key")
    assert parser.parse_args([f"--key.{name}={right}"]).key[name] is not None
    for value in wrong:
        with pytest.raises(ArgumentError, match=f"key.{name}"):
            parser.parse_args([f"--key.{name}={value}"])
