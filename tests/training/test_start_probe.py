"""The start probe: what it refuses, and that nothing else changes."""

import random

import pytest
import torch
from lightning.pytorch import Callback

from egspo_lightning.callbacks.stage_transition import StageTransition
from egspo_lightning.errors import UserError
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.ops.estimators import GAE
from egspo_lightning.rollout.transformers_engine import TransformersEngine

METHODS = {"group": {}, "critic": {"advantage": GAE(), "critic": CriticConfig("own")}}


class States(Callback):
    """Random states, weights and modes before and after the first loader, which the probe precedes."""

    def __init__(self):
        self.seen = []

    def on_fit_start(self, trainer, pl_module):
        self.seen.append(self.states(pl_module))

    def on_train_start(self, trainer, pl_module):
        self.seen.append(self.states(pl_module))

    @staticmethod
    def states(module):
        modes = [part.training for part in module.modules()]
        return random.getstate(), torch.get_rng_state(), modes, [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_the_probe_changes_no_random_state_no_weight_and_no_mode(tiny_run, method):
    states = States()
    tiny_run(states, module=METHODS[method], trainer={"max_epochs": 1}).fit()
    (numbers, generator, modes, weights), (later_numbers, later_generator, later_modes, later_weights) = states.seen
    assert numbers == later_numbers
    assert torch.equal(generator, later_generator)
    assert modes == later_modes
    assert all(modes)
    assert all(torch.equal(one, other) for one, other in zip(weights, later_weights, strict=True))


@pytest.mark.parametrize("part", ["score", "trained_logprobs"])
def test_passes_that_disagree_are_refused_before_a_step(tiny_run, part):
    run = tiny_run(StageTransition(save_checkpoint=False), trainer={"max_epochs": 2})
    computed = getattr(run.module, part)

    def at_another_temperature(*batch):
        run.module.temperature = 0.5
        try:
            return computed(*batch)
        finally:
            run.module.temperature = 1.0

    setattr(run.module, part, at_another_temperature)
    with pytest.raises(UserError, match=r"type 'llama' .* cannot be trained here.*nats a token.*attn_implementation"):
        run.fit()
    assert run.trainer.global_step == 0


class OwnEngine(TransformersEngine):
    """An engine of the user's own."""

    def stream(self, lm, requests, sampling, *, eos_ids, pad_id):
        raise AssertionError("nothing is to be sampled in stage SFT")
        yield


def test_an_engine_of_the_users_own_is_left_to_the_first_rollout_batch(tiny_run):
    run = tiny_run(data={"engine": OwnEngine()}, trainer={"max_epochs": 1}).fit()
    assert run.trainer.global_step > 0


def test_the_probe_keeps_to_the_length_limits(tiny_run, monkeypatch):
    asked = []
    stream = TransformersEngine.stream

    def watched(self, lm, requests, sampling, **ids):
        asked.append(({len(request.prompt_ids) for request in requests}, sampling.max_completion_length))
        return stream(self, lm, requests, sampling, **ids)

    monkeypatch.setattr(TransformersEngine, "stream", watched)
    tiny_run(trainer={"max_epochs": 1}).fit()
    assert asked == [({4, 8}, 6)]  # data.max_prompt_length is 8
