"""Short comparisons from the command line: interrupted, resumed, with a killed parent, with failing runs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from egspo_lightning.cli.report_command import write_report


def shortened(config, model, **data):
    """The quickstart config with small sizes."""
    config["trainer"]["max_epochs"] = 10
    config["model"]["policy"]["name_or_path"] = model
    config["data"]["demonstrations"]["init_args"]["num_demonstrations"] = 64
    config["data"]["benchmarks"][0]["init_args"]["num_problems"] = 8
    config["data"] |= {"num_problems": 4, **data}
    config["stage_transition"]["after_epochs"] = 2
    return config


@pytest.fixture
def start(repository, small_model, tmp_path):
    """Start the command in its own process group."""

    def with_config(*arguments, methods=("grpo", "egspo"), **data):
        quickstart = yaml.safe_load((repository / "configs" / "quickstart.yaml").read_text())
        short = tmp_path / "short.yaml"
        short.write_text(yaml.safe_dump(shortened(quickstart, small_model, **data)))
        command = [sys.executable, "-m", "egspo_lightning", "compare", "--config", str(short)]
        command += ["--phases", "3", "--evaluate_every", "1", "-o", "out", "--jobs", "2"]
        command += ["--methods", *methods, *arguments]
        environment = os.environ | {"PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes)

    return with_config


def finished(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.glob("runs/*/*.json")}


def wait_for(condition, process, seconds=900):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_gone(group, seconds):
    """Whether all processes of the group end within ``seconds``; Python's resource tracker ends with a delay."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_an_interrupted_comparison_resumes(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    process = start("--seeds", "1", "2")
    wait_for(lambda: len(finished(out)) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    assert is_gone(process.pid, seconds=60)
    before = finished(out)
    assert 3 <= len(before) < 6
    assert not (out / "table.md").exists()

    process = start("--seeds", "1", "2")
    printed, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    after = finished(out)
    assert len(after) == 6
    assert before.items() <= after.items()  # finished runs did not run again
    assert f"({len(before) + 1} of 6 runs ended)" in errors
    for words in ("minus grpo", "seeds won", "after_sft", "egspo", "of 2", "Intervals over 2 seeds are too narrow"):
        assert words in printed
    for name in ("table.md", "results.csv", "problems.csv.gz", "curves.png"):
        assert (out / name).stat().st_size > 0
    assert not (out / "unfinished").exists()
    (see,) = [line for line in printed.splitlines() if line.startswith("See: egspo report ")]
    write_report([*see.split()[3:-1], str(tmp_path / "report.html")], "")
    assert (tmp_path / "report.html").stat().st_size > 0
    assert not list(out.glob("runs/**/*.ckpt"))
    results = [json.loads((out / path).read_text()) for path in after]
    methods = [result for result in results if result["method"]]
    assert {result["optimizer_steps"] for result in methods} == {3 * 4}
    for seed in (1, 2):
        assert len({result["checkpoint"] for result in results if result["seed"] == seed}) == 1
    for result in methods:
        assert [phase for phase, _ in result["curve"]] == [0, 1, 2, 3]
        assert len(result["problems"]) == 8

    process = start("--seeds", "1", "2", "--evaluate_every", "2", num_problems=5)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "config[0].data.num_problems: stored 4, now 5; evaluate_every: stored 1, now 2" in errors
    assert finished(out) == after


@pytest.mark.slow
def test_workers_end_when_the_parent_is_killed(start, tmp_path):
    process = start("--seeds", "1")
    wait_for(lambda: any((tmp_path / "out" / "unfinished").glob("*/*")), process)
    process.kill()
    process.communicate(timeout=120)
    assert is_gone(process.pid, seconds=60)


BROKEN = """
from egspo_lightning import CorrectnessReward


class Broken(CorrectnessReward):
    def __call__(self, *args, **kwargs):
        raise RuntimeError("my reward is broken")
"""


@pytest.mark.slow
def test_a_failed_run_loses_no_other_and_is_reported_with_its_log(start, tmp_path):
    (tmp_path / "broken_reward.py").write_text(BROKEN)
    (tmp_path / "mine.yaml").write_text("model: {method: mine}\ndata: {reward: broken_reward.Broken}")
    flags = ["--seeds", "1", "--stage_transition.after_epochs=3"]
    process = start(*flags, methods=("mine.yaml", "sft"))
    printed, errors = process.communicate(timeout=900)
    assert process.returncode == 1, errors
    log = "out/runs/mine/seed_1.log"
    line = next(line for line in errors.splitlines() if line.startswith("failed: mine, seed 1: "))
    assert line.endswith(f"my reward is broken (log: {log})")
    assert "Failed runs: 1. The same command tries them again." in errors
    assert "broken_reward.py" in (tmp_path / log).read_text()
    assert all(f"\u2502 {name} " in printed for name in ("sft", "after_sft"))
    assert "\u2502 mine" not in printed
    assert "--stage_transition.after_epochs=3" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.slow
def test_a_method_that_cannot_be_built_is_refused_before_the_first_run(start, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {gate: {class_path: QuantileGate, init_args: {top_fraction: 7}}}")
    process = start("--seeds", "1", methods=("grpo", "mine.yaml"))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "error: --methods: mine: " in errors
    assert "top_fraction" in errors
    assert "Traceback" not in errors
    assert finished(tmp_path / "out") == {}
