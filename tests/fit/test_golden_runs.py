"""Four short fixed-seed runs keep their stored metrics: a change detector, not a proof of correctness.

The stored values change only in a commit that names the cause and shows old and new values; golden_runs.py writes them.
Another CPU or another version of torch rounds differently, and one sampled token may change the rest of a run. So a run
may have a record for each of several processors, and must equal one of them. To judge a change on a processor without a
record, compare two checkouts bitwise with compare_checkouts.py.
"""

import json

import pytest

from golden_recorder import NUM_STEPS
from golden_runs import RUNS, STORED, record

STORED_STEPS = json.loads(STORED.read_text())
"""Run to processor to optimizer steps."""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_its_stored_metrics(name, repository):
    steps = record(name, repository)["steps"]
    found = {processor: first_difference(steps, stored) for processor, stored in STORED_STEPS[name].items()}
    assert None in found.values(), found


def first_difference(steps, stored):
    for i, (new, old) in enumerate(zip(steps, stored, strict=True)):
        if new != pytest.approx(old, rel=1e-5, abs=1e-5):
            return f"optimizer step {i + 1} of stage EGSPO: {old} -> {new}"
    return None


@pytest.mark.parametrize(("name", "steps"), [(name, steps) for name in RUNS for steps in STORED_STEPS[name].values()])
def test_stored_metrics_come_from_runs_that_learn(name, steps):
    """Rewards differ within groups, gradients are not zero, and a gate has a threshold."""
    assert len(steps) == NUM_STEPS
    assert all(step["gradient_norm"] > 0 for step in steps)
    ends = [step for step in steps if "rollout/reward_mean" in step]
    assert len(ends) == 2
    assert all(0 < step["rollout/reward_mean"] < 1 and step["rollout/reward_std"] > 0 for step in ends)
    has_gate = name in ("quickstart_egspo", "quickstart_fsdp2")
    assert all(("gate/threshold" in step) == has_gate for step in ends)
    assert all(step["gate/threshold"] > 0 for step in ends if has_gate)
