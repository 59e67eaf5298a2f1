"""Short comparisons from the command line: interrupted, resumed, with a killed parent, with failing runs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml


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
    """Start the script in its own process group."""

    def with_config(*arguments, **data):
        quickstart = yaml.safe_load((repository / "configs" / "quickstart.yaml").read_text())
        short = tmp_path / "short.yaml"
        short.write_text(yaml.safe_dump(shortened(quickstart, small_model, **data)))
        command = [
            sys.executable,
            "benchmarks/compare_methods.py",
            "--config",
            str(short),
            "--methods",
            "grpo",
            "egspo",
        ]
        command += ["--phases", "3", "--evaluate_every", "1"]
        command += ["--output", str(tmp_path / "out"), "--jobs", "2", *arguments]
        environment = os.environ | {"PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(
            command, cwd=repository, env=environment, start_new_session=True, text=True, stderr=subprocess.PIPE
        )

    return with_config


def finished(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.glob("runs/*/*.json")}


def wait_for(condition, process, seconds=240):
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
def test_an_interrupted_comparison_resumes(start, tmp_path):
    out = tmp_path / "out"
    process = start("--seeds", "1", "2")
    wait_for(lambda: len(finished(out)) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "the same command resumes" in errors
    assert "Traceback" not in errors
    assert is_gone(process.pid, seconds=5)
    before = finished(out)
    assert 3 <= len(before) < 6
    assert not (out / "table.md").exists()

    process = start("--seeds", "1", "2")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    after = finished(out)
    assert len(after) == 6
    assert before.items() <= after.items()  # finished runs did not run again
    assert f"{len(before) + 1}/6 runs ended" in errors
    for name in ("table.md", "results.csv", "problems.csv.gz", "curves.png"):
        assert (out / name).stat().st_size > 0
    results = [json.loads((out / path).read_text()) for path in after]
    assert {r["optimizer_steps"] for r in results if r["method"]} == {3 * 4}
    for seed in (1, 2):
        assert len({r["checkpoint"] for r in results if r["seed"] == seed}) == 1
    grpo = next(r for r in results if r["method"] == "grpo")
    assert [phase for phase, _ in grpo["curve"]] == [0, 1, 2, 3]
    assert len(grpo["problems"]) == 8
    assert not any((out / "unfinished").glob("*/*"))


@pytest.mark.slow
def test_workers_end_when_the_parent_is_killed(start, tmp_path):
    process = start("--seeds", "1")
    wait_for(lambda: any((tmp_path / "out" / "unfinished").glob("*/*")), process)
    process.kill()
    process.communicate(timeout=30)
    assert is_gone(process.pid, seconds=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "reason"),
    [({"max_prompt_length": 1}, "max_prompt_length"), ({"num_problem": 4}, "num_problem")],
    ids=["refused value", "unknown key"],
)
def test_failed_runs_are_reported(start, tmp_path, mistake, reason):
    process = start("--seeds", "1", **mistake)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    line = next(line for line in errors.splitlines() if line.startswith("failed: after_sft, seed 1: "))
    assert reason in line
    assert "failed: grpo, seed 1: its SFT run failed" in errors
    assert "3 runs failed. The same command tries them again." in errors
    assert reason in (tmp_path / "out" / "runs" / "after_sft" / "seed_1.error.txt").read_text()
