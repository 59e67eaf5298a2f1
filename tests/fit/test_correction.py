"""Sampler correction in training, with an engine whose log-probabilities differ from the policy's."""

import math

import pytest
import torch
from lightning.pytorch import Callback

from egspo_lightning import PhaseCheckpoint
from egspo_lightning.ops.correction import SamplerCorrection
from egspo_lightning.ops.objective import Objective
from egspo_lightning.rollout.transformers_engine import TransformersEngine

TILT = 0.09
"""Nats; below the limit for stale weights."""


class Tilted(TransformersEngine):
    """Overstates the log-probability of every second token, and gives none for the first."""

    def stream(self, lm, requests, sampling, *, eos_ids, pad_id):
        for batch in super().stream(lm, requests, sampling, eos_ids=eos_ids, pad_id=pad_id):
            yield [(number, self.tilt(sample)) for number, sample in batch]

    def tilt(self, sample):
        tilted = [value + TILT * (i % 2) for i, value in enumerate(sample.logprobs)]
        return sample._replace(logprobs=[math.nan, *tilted[1:]], entropies=None)


class Spy(Callback):
    """Records the metrics of each phase and the rollouts."""

    def __init__(self):
        self.metrics, self.rollouts = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rollouts.append(batch.rollout)

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def run_of(tiny_run, *callbacks, correction=SamplerCorrection(), engine=Tilted, **trainer):  # noqa: B008
    module = {"initial_stage": "egspo", "objective": Objective(mu=0.0, sampler_correction=correction)}
    return tiny_run(*callbacks, module=module, data={"engine": engine()}, trainer={"max_epochs": 2} | trainer)


def weights(run):
    return [p.detach().clone() for p in run.module.policy.parameters()]


def test_sampled_logprobs_reach_the_loss_and_the_metrics(tiny_run):
    spy = Spy()
    run = run_of(tiny_run, spy, correction=SamplerCorrection("masked", "token", 1.05)).fit()
    tokens = tilted = 0
    for rollout in spy.rollouts:
        mask, first = rollout.completion_mask, rollout.completion_mask.int().argmax(1)
        place = torch.arange(mask.shape[1]) - first[:, None]
        assert rollout.sampled_logprobs[mask & (place == 0)].isnan().all()
        shift = (rollout.sampled_logprobs - rollout.old_logprobs)[mask & (place > 0)]
        odd = (place % 2 == 1)[mask & (place > 0)]
        assert shift[odd].sub(TILT).abs().max() < 1e-5
        assert shift[~odd].abs().max() < 1e-5
    for row in run.data.phases.rollouts.batch.completion_mask.sum(1).tolist():
        tokens, tilted = tokens + row, tilted + row // 2
    metrics = spy.metrics[-1]
    assert metrics["policy/sampler_corrected_fraction"] == pytest.approx(tilted / tokens, rel=1e-5)
    mean = (tokens - tilted + tilted * math.exp(-TILT)) / tokens
    assert metrics["policy/sampler_ratio_mean"] == pytest.approx(mean, rel=1e-5)
    assert metrics["policy/sampler_ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["rollout/sampler_gap"] == pytest.approx(
        TILT * tilted / (tokens - len(run.data.phases.rollouts.completions)), rel=1e-4
    )


def test_only_an_enabled_correction_changes_the_optimizer_steps(tiny_run):
    class Untilted(Tilted):
        def tilt(self, sample):
            return sample._replace(entropies=None)

    plain, off, corrected = (
        weights(run_of(tiny_run, engine=engine, correction=correction).fit())
        for engine, correction in (
            (Untilted, SamplerCorrection()),
            (Tilted, SamplerCorrection()),
            (Tilted, SamplerCorrection("truncated", "sequence", 2.0)),
        )
    )
    assert all(map(torch.equal, plain, off))
    assert not any(map(torch.equal, plain, corrected))


def test_stale_weights_are_detected_despite_the_correction(tiny_run):
    class Stale(Tilted):
        def tilt(self, sample):
            return sample._replace(logprobs=[value + 0.2 for value in sample.logprobs], entropies=None)

    with pytest.raises(RuntimeError, match="samples from another distribution"):
        run_of(tiny_run, engine=Stale, correction=SamplerCorrection("truncated")).fit()


def test_a_resumed_phase_keeps_the_sampled_logprobs(tiny_run, tmp_path):
    correction = SamplerCorrection("truncated", "sequence", 2.0)
    save = PhaseCheckpoint(dirpath=tmp_path / "saved", save_top_k=-1, every_n_train_steps=1)
    whole = run_of(tiny_run, save, correction=correction, enable_checkpointing=True).fit()
    within = next((tmp_path / "saved").glob("*step=3.ckpt"))  # steps 3 and 4 belong to the second batch
    spy = Spy()
    rest = run_of(tiny_run, spy, correction=correction).fit(ckpt_path=within, weights_only=True)
    assert len(spy.rollouts) == 1
    assert spy.rollouts[0].sampled_logprobs is not None
    assert all(map(torch.equal, weights(rest), weights(whole)))
