"""Four short fixed-seed runs keep their stored metrics: a change detector, not a proof of correctness.

The stored values change only in a commit that names the cause and shows old and new values; golden_runs.py writes them.
Another CPU or another version of torch rounds differently, and one sampled token may change the rest of a run. To judge
a change on such a machine, compare two checkouts bitwise with compare_checkouts.py.
"""

import json

import pytest

from golden_recorder import NUM_STEPS
from golden_runs import RUNS, STORED, record

STEPS = json.loads(STORED.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_its_stored_metrics(name, repository):
    steps = record(name, repository)["steps"]
    assert len(steps) == len(STEPS[name])
    for i, (step, stored) in enumerate(zip(steps, STEPS[name], strict=True)):
        assert step == pytest.approx(stored, rel=1e-5, abs=1e-5), f"optimizer step {i + 1} of stage EGSPO"


@pytest.mark.parametrize("name", RUNS)
def test_stored_metrics_come_from_runs_that_learn(name):
    """Rewards differ within groups, gradients are not zero, and a gate has a threshold."""
    steps = STEPS[name]
    assert len(steps) == NUM_STEPS
    assert all(step["gradient_norm"] > 0 for step in steps)
    ends = [step for step in steps if "rollout/reward_mean" in step]
    assert len(ends) == 2
    assert all(0 < step["rollout/reward_mean"] < 1 and step["rollout/reward_std"] > 0 for step in ends)
    has_gate = name in ("quickstart_egspo", "quickstart_fsdp2")
    assert all(("gate/threshold" in step) == has_gate for step in ends)
    assert all(step["gate/threshold"] > 0 for step in ends if has_gate)
