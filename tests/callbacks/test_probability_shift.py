"""ProbabilityShift: changes of log-probability by branch and sign of the advantage, against separate passes."""

import numpy as np
import pytest
import torch

from egspo_lightning import ProbabilityShift

ONE_ROLLOUT_BATCH = {"module": {"initial_stage": "egspo"}, "trainer": {"max_epochs": 1}, "logger": True}
NAMES = ["high_positive", "high_negative", "low_positive", "low_negative"]


def test_shifts_are_the_means_of_an_own_forward_pass(tiny_run, events):
    run = tiny_run(ProbabilityShift(top_fraction=0.3), **ONE_ROLLOUT_BATCH).fit()
    rollout, log = run.data.phases.rollouts.batch, events(run.trainer)
    moved, entropies, advantages = [], [], []
    for row, mask in enumerate(rollout.completion_mask):
        ids = rollout.input_ids[row][: int(mask.nonzero().max()) + 1]
        with torch.no_grad():
            logprobs = run.module.policy.lm(ids.unsqueeze(0)).logits[0].double().log_softmax(-1)
        for place in mask.nonzero().flatten().tolist():
            moved.append(float(logprobs[place - 1, ids[place]] - rollout.old_logprobs[row, place]))
            entropies.append(float(rollout.entropies[row, place]))
            advantages.append(float(rollout.advantages[row, place]))
    moved, high = np.array(moved), np.array(entropies) >= np.quantile(entropies, 0.7)
    positive, negative = np.array(advantages) > 0, np.array(advantages) < 0
    groups = [high & positive, high & negative, ~high & positive, ~high & negative]
    for name, group in zip(NAMES, groups, strict=True):
        assert log.Scalars(f"shift/{name}")[0].value == pytest.approx(moved[group].mean(), abs=1e-5)
        assert run.trainer.callback_metrics[f"shift/{name}"] == pytest.approx(moved[group].mean(), abs=1e-5)
    assert np.abs(moved).mean() > 1e-3


def test_group_without_tokens_is_not_logged(tiny_run, events):
    run = tiny_run(ProbabilityShift(top_fraction=1.0), **ONE_ROLLOUT_BATCH).fit()
    found = [tag for tag in events(run.trainer).Tags()["scalars"] if tag.startswith("shift/")]
    assert sorted(found) == ["shift/high_negative", "shift/high_positive"]


@pytest.mark.parametrize(("every", "steps"), [(2, [1, 5]), (0, [])])
def test_shifts_are_logged_every_n_rollout_batches(tiny_run, events, every, steps):
    run = tiny_run(ProbabilityShift(every), **ONE_ROLLOUT_BATCH | {"trainer": {"max_epochs": 3}}).fit()
    log = events(run.trainer)
    is_logged = "shift/low_negative" in log.Tags()["scalars"]
    assert [event.step for event in (log.Scalars("shift/low_negative") if is_logged else [])] == steps
