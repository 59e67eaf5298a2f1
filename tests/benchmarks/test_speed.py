"""Short runs of the speed and memory benchmarks, and unit tests of their timing and statistics."""

import importlib
import json
import time

import pytest
import torch

from measuring import heads
from measuring.memory import peak
from measuring.report import table
from measuring.timing import Reading, Spread, Stopwatch, interleave, median_interval, ratio, seconds


def run(name, tmp_path, *flags):
    output = tmp_path / f"{name}.json"
    module = importlib.import_module(name)
    assert module.main(["--rounds", "1", "--threads", "1", "--output", str(output), "--note", "a test", *flags]) == 0
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return str(tmp_path_factory.mktemp("models"))


def test_gate_overhead(tmp_path, models, capsys):
    found = run("gate_overhead", tmp_path, "--workloads", "smoke", "--models", models)
    (rows,) = found["tables"].values()
    assert [row["variant"] for row in rows] == ["EGSPO", "no gate, no entropy"]
    assert rows[0]["pairs"] == rows[1]["pairs"] == 1
    assert found["note"] == "a test"
    assert {"processor", "versions", "revision", "load"} <= found["machine"].keys()
    assert "| EGSPO | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "ranks"), [(1, (1, 1)), (6, (1, 6)), (10, (2, 9)), (25, (8, 18)), (100, (40, 61))])
def test_the_median_interval_is_that_of_the_sign_test(count, ranks):
    """Ranks from tables of nonparametric statistics."""
    assert median_interval(list(range(count, 0, -1))) == ranks


def test_step_efficiency(tmp_path, models):
    (rows,) = run("step_efficiency", tmp_path, "--workloads", "smoke", "--models", models)["tables"].values()
    assert [row["work"] for row in rows] == ["4 optimizer steps", "sampling 8 completions"]


@pytest.mark.slow
def test_asynchronous(tmp_path, models):
    found = run("asynchronous", tmp_path, "--workloads", "smoke", "--models", models, "--iterations", "2")
    (rows,) = found["tables"].values()
    assert [row["variant"].split(",")[0] for row in rows] == ["max_staleness 0", "max_staleness 1", "max_staleness 0"]
    assert rows[0]["time / baseline"].startswith("1 ")
    assert rows[0]["waiting for rollouts, s"].startswith("0 ")
    assert not rows[1]["waiting for rollouts, s"].startswith("0 ")


@pytest.mark.slow
def test_scaling(tmp_path, models):
    small = ["--factors", "2", "--problems", "1", "--length", "32", "--vocabulary", "300", "--hidden", "32"]
    found = run("scaling", tmp_path, "--iterations", "1", "--models", models, *small)
    (rows,) = found["tables"].values()
    assert [(row["size"], row["factor"]) for row in rows] == [
        ("base", 1),
        ("G", 2),
        ("length", 2),
        ("vocabulary", 2),
    ]
    assert rows[0]["time per unit / base"].startswith("1 ")
    assert rows[1]["tokens"] > rows[0]["tokens"]


@pytest.mark.slow  # three processes, one of which imports TRL if it is installed
def test_token_stats_memory(tmp_path):
    small = ["--tokens", "64", "--vocabulary", "500", "--hidden", "16", "--check_tokens", "8"]
    found = run("token_stats_memory", tmp_path, *small, "--variants", "naive", "ours", "TRL, fused head")
    rows, gradients = found["tables"].values()
    assert [row["variant"] for row in rows] == ["naive", "ours", "TRL, fused head"]
    assert rows[0]["memory / naive"] == 1.0
    if heads.missing_package("TRL, fused head"):
        assert rows[2]["remark"] == "skipped: trl is not installed"
    assert next(row for row in gradients if row["variant"] == "ours")["largest relative error"] < 1e-5


def test_against_trl(tmp_path, models):
    pytest.importorskip("trl", reason="the comparison with TRL needs it")
    flags = ["--workloads", "smoke", "--models", models, "--iterations", "1", "--target", "0"]
    (rows,) = run("against_trl", tmp_path, *flags)["tables"].values()
    assert [row["trainer"] for row in rows] == ["ours", "TRL"]


def test_all_variants_compute_the_same_statistics():
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(20, 8), torch.randn(50, 8), torch.randint(50, (20,))
    expected = heads.naive(hidden, weight, ids)
    for name in heads.VARIANTS:
        if heads.missing_package(name) is None:
            logprobs, entropies = heads.VARIANTS[name].statistics(hidden, weight, ids)
            torch.testing.assert_close(logprobs, expected[0], rtol=0, atol=1e-5)
            if entropies is not None:
                torch.testing.assert_close(entropies, expected[1], rtol=0, atol=1e-5)


def test_rounds_are_interleaved_and_warm_up_does_not_count():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    results = interleave(variants, 2, warmup=1)
    assert "".join(calls) == "baabba"
    assert {name: len(found) for name, found in results.items()} == {"a": 2, "b": 2}


def test_ratios_are_paired_by_round():
    slow, fast = [Reading(4.0, 2.0), Reading(30.0, 3.0), Reading(6.0, 4.0)], [Reading(2.0, 1.0), Reading(10.0, 1.0)]
    fast.append(Reading(6.0, 1.0))
    assert ratio(slow, fast) == Spread(2.0, 1.5, 2.5)
    assert ratio(slow, fast, "cpu").median == 3.0
    assert seconds(slow).median == 6.0


def test_a_paused_stopwatch_does_not_count():
    watch = Stopwatch()
    watch.start()
    watch.stop()
    stopped = watch.total
    time.sleep(0.01)
    assert watch.total == stopped


def test_peak_memory_of_a_call():
    assert peak(lambda: torch.ones(2**24).sum()) == pytest.approx(64, abs=8)  # 2**24 float32


def test_table_is_markdown():
    assert table([{"a": 1, "b": 0.12345}]) == "| a | b |\n| --- | ---: |\n| 1 | 0.123 |"
