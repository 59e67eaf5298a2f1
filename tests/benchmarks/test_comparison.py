"""The comparison from its command line, in very short form: stopped halfway, resumed, and with a run that fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml


def shortened(config, model, **data):
    """The quickstart with little of everything."""
    config["trainer"]["max_epochs"] = 10
    config["model"]["policy"]["name_or_path"] = model
    config["data"]["demonstrations"]["init_args"]["num_demonstrations"] = 64
    config["data"]["benchmarks"][0]["init_args"]["num_problems"] = 8
    config["data"] |= {"num_problems": 4, **data}
    config["stage_transition"]["after_epochs"] = 2
    return config


@pytest.fixture
def start(repository, small_model, tmp_path):
    """Starts the script in a process group of its own."""

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
    """Whether no process of the group is left after so many seconds; Python's resource tracker takes a moment."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_stopped_halfway_and_resumed(start, tmp_path):
    out = tmp_path / "out"
    process = start("--seeds", "1", "2")
    wait_for(lambda: len(finished(out)) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert "the same command goes on from there" in told
    assert "Traceback" not in told
    assert is_gone(process.pid, seconds=5)
    before = finished(out)
    assert 3 <= len(before) < 6
    assert not (out / "table.md").exists()

    process = start("--seeds", "1", "2")
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    after = finished(out)
    assert len(after) == 6
    assert before.items() <= after.items()  # what was finished was not made again
    assert f"{len(before) + 1}/6 runs ended" in told
    for name in ("table.md", "results.csv", "problems.csv.gz", "curves.png"):
        assert (out / name).stat().st_size > 0
    results = [json.loads((out / path).read_text()) for path in after]
    assert {r["updates"] for r in results if r["method"]} == {3 * 4}
    for seed in (1, 2):
        assert len({r["checkpoint"] for r in results if r["seed"] == seed}) == 1
    grpo = next(r for r in results if r["method"] == "grpo")
    assert [phase for phase, _ in grpo["curve"]] == [0, 1, 2, 3]
    assert len(grpo["problems"]) == 8
    assert not any((out / "unfinished").glob("*/*"))


@pytest.mark.slow
def test_a_parent_that_is_killed_takes_its_workers_along(start, tmp_path):
    process = start("--seeds", "1")
    wait_for(lambda: any((tmp_path / "out" / "unfinished").glob("*/*")), process)
    process.kill()
    process.communicate(timeout=30)
    assert is_gone(process.pid, seconds=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "reason"),
    [({"max_prompt_length": 1}, "max_prompt_length"), ({"num_problem": 4}, "num_problem")],
    ids=["a value that the project refuses", "a key that the parser refuses"],
)
def test_a_run_that_fails_is_told(start, tmp_path, mistake, reason):
    process = start("--seeds", "1", **mistake)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    line = next(line for line in told.splitlines() if line.startswith("failed: after_sft, seed 1: "))
    assert reason in line
    assert "failed: grpo, seed 1: the SFT that it starts from has failed" in told
    assert "3 runs have failed. The same command tries them again." in told
    assert reason in (tmp_path / "out" / "runs" / "after_sft" / "seed_1.error.txt").read_text()
