"""Soak test: 250 rollout batches with random faults; fault counts are exact, and the policy still learns."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

NUM_ROLLOUT_BATCHES, SFT_PHASES = 250, 20


@pytest.fixture(scope="module")
def soaked(repository, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    arguments = [
        "--config=configs/quickstart.yaml",
        f"--trainer.max_epochs={SFT_PHASES + NUM_ROLLOUT_BATCHES}",
        f"--trainer.default_root_dir={folder}",
        "--trainer.enable_progress_bar=false",
        f"--stage_transition.after_epochs={SFT_PHASES}",
        "--stage_transition.monitor=null",
        "--stage_transition.target=null",
        "--data.benchmarks.init_args.num_problems=256",
        "--data.reward=egspo_lightning.rewards.functions.CorrectnessReward",
        "--data.reward.deadline_s=1",
    ]
    here = Path(__file__).parent
    program = [sys.executable, str(here / "soak.py"), str(folder), str(NUM_ROLLOUT_BATCHES), "--", *arguments]
    with (folder / "output").open("w") as output:
        subprocess.run(
            program,
            cwd=repository,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=1800,
            check=True,
        )
    return folder


@pytest.fixture(scope="module")
def rows(soaked) -> list[dict]:
    return [json.loads(line) for line in (soaked / "faults.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rollout_batches(rows) -> dict[int, dict]:
    """The last row of each rollout batch; those after a checkpoint ran twice."""
    found = {row["rollout_batch"]: row for row in rows if row["rollout_batch"] >= 0}
    assert list(found) == sorted(found)
    return found


@pytest.mark.slow
def test_each_process_ends_with_its_code_and_message(soaked):
    first, second, third = json.loads((soaked / "codes.json").read_text())
    text = (soaked / "output").read_text()
    assert first == 128 + signal.SIGTERM
    assert "Ended by SIGTERM. Saved " in text
    assert second not in (0, first)
    assert os.strerror(errno.ENOSPC) in text
    assert third == 0
    assert "Traceback" not in text


@pytest.mark.slow
def test_metrics_count_the_injected_faults(rollout_batches):
    injected = Counter(row["fault"] for row in rollout_batches.values())
    assert len(injected) == 8  # seven kinds, and no fault
    assert min(injected.values()) >= 3
    last = rollout_batches[max(rollout_batches)]["metrics"]
    assert last["fault/nonfinite_updates"] == injected["nan_loss"] + injected["infinite_gradient"]
    for kind, metric in (("timeout", "rollout/grader_timeouts"), ("crash", "rollout/grader_crashes")):
        assert {n: row["metrics"][metric] for n, row in rollout_batches.items() if row["metrics"][metric]} == {
            n: 1.0 for n, row in rollout_batches.items() if row["fault"] == kind
        }
    whole = {n for n, row in rollout_batches.items() if row["metrics"]["rollout/truncated_fraction"] == 1}
    assert whole == {n for n, row in rollout_batches.items() if row["fault"] == "truncated"}
    flat = {n for n, row in rollout_batches.items() if row["metrics"]["rollout/zero_spread_fraction"] == 1}
    assert flat >= {n for n, row in rollout_batches.items() if row["fault"] == "flat"}
    assert last["guard/flat_rollout_batches"] == len(flat)


@pytest.mark.slow
def test_the_policy_still_learns(soaked):
    (run,) = (soaked / "lightning_logs").iterdir()
    scores = [json.loads(line) for line in (run / "benchmarks.jsonl").read_text().splitlines()]
    _before, after_sft, after_egspo = (score["benchmarks"][0]["metrics"]["avg@1"] for score in scores)
    assert after_egspo > after_sft


@pytest.mark.slow
def test_memory_does_not_grow(rows):
    """Between phases 20 and 200 of the last process."""
    memory = [row["memory_mb"] for row in rows if row["pid"] == rows[-1]["pid"]]
    assert len(memory) >= 200
    assert memory[199] <= 1.05 * memory[19]
