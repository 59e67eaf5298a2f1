"""Token budget of micro-batches: the same optimizer steps, with as few micro-batches as the budget allows."""

from itertools import chain

import pytest
import torch
from lightning.pytorch import Callback

from egspo_lightning import PhaseCheckpoint, StageTransition
from egspo_lightning.errors import UserError
from egspo_lightning.models import batched_forward
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.ops.batching import row_lengths
from egspo_lightning.ops.estimators import GAE
from egspo_lightning.ops.gate import OpenGate
from egspo_lightning.ops.objective import Objective
from spies import Spy, distance, slow

BUDGET = 60
"""In tokens; two or three rows of at most 8 + 18 tokens fit."""
STEADY = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}
"""SGD, which does not amplify rounding errors."""
METHODS = {
    "egspo": {},
    "grpo": {"gate": OpenGate(), "objective": Objective(mu=0.0)},
    "ppo": {"advantage": GAE(), "critic": CriticConfig("own"), "objective": Objective(beta=0.1, mu=0.0)},
    "value_head": {"advantage": GAE(), "critic": CriticConfig("shared")},
}


@pytest.fixture(autouse=True)
def no_padding(monkeypatch):
    """Pack all batches, so that no pass contains padding."""
    monkeypatch.setattr(batched_forward, "PACKED_WORTH", 0)


class Passes(Callback):
    """Records the tokens that the decoder gets in each micro-batch, and the accumulation state of the trainer."""

    def __init__(self):
        self.seen, self.phases = 0, []

    def on_fit_start(self, trainer, pl_module):
        def count(decoder, args, kwargs):
            if torch.is_grad_enabled():  # excludes sampling and scoring
                self.seen += kwargs["input_ids"].numel()

        pl_module.policy.lm.get_decoder().register_forward_pre_hook(count, with_kwargs=True)

    def on_train_epoch_start(self, trainer, pl_module):
        self.phases.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        parts = [part for part in (batch.rollout, batch.expert) if part is not None]
        lengths = [length for part in parts for length in row_lengths(part.completion_mask).tolist() if length]
        assert trainer.val_check_batch == trainer.num_training_batches  # Lightning validates at the end of the epoch
        step = (self.seen, trainer.accumulate_grad_batches, trainer.is_last_batch, trainer.global_step)
        self.phases[-1].append((lengths, len(parts), *step))


def least_number(lengths, most):
    """Minimal number of micro-batches by dynamic programming over the sorted lengths."""
    ordered, best = sorted(lengths), [0]
    for end in range(1, len(ordered) + 1):
        best.append(min(best[start] + 1 for start in range(end) if sum(ordered[start:end]) <= most))
    return max(best[-1], 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_changes_neither_losses_nor_weights(tiny_run, method):
    """Two phases of SFT with two optimizer steps each, then two of EGSPO with four each."""
    ends = []
    for budget in (None, BUDGET):
        spy = Spy()
        data = {"num_ppo_epochs": 2, "max_tokens_per_micro_batch": budget}
        module = STEADY | METHODS[method]
        run = tiny_run(StageTransition(after_epochs=2), spy, module=module, data=data, trainer={"max_epochs": 4}).fit()
        assert run.trainer.global_step == 12
        ends.append(spy)
    whole, cut = ends
    assert len(cut.batches) > 3 * len(whole.batches)
    for ours, theirs in zip(cut.gradients, whole.gradients, strict=True):
        assert distance(ours, theirs) < 1e-5
    for ours, theirs in zip(cut.weights, whole.weights, strict=True):
        assert distance(ours, theirs) < 1e-6
    names = [name for name in whole.metrics[0] if name.startswith(("loss/", "policy/", "gate/", "value/"))]
    assert len(names) > 10
    for name in names:
        assert cut.metrics[0][name] == pytest.approx(whole.metrics[0][name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("method", ["egspo", "grpo"])
@pytest.mark.parametrize("staleness", [0, 1])
def test_micro_batches_keep_the_budget_and_are_as_few_as_possible(tiny_run, method, staleness):
    spy = Passes()
    data = {"num_ppo_epochs": 2, "max_tokens_per_micro_batch": BUDGET, "max_staleness": staleness}
    module = METHODS[method]
    callbacks = (StageTransition(after_epochs=1), spy)
    run = tiny_run(*callbacks, module=module, data=data, trainer={"max_epochs": 5}).fit()
    step = 0
    for phase, num_updates in zip(spy.phases, [2, 4, 4, 4, 4], strict=True):
        lengths, kinds, seen, parts, is_last, steps = zip(*phase, strict=True)
        assert max(seen) <= BUDGET
        assert max(seen) > BUDGET // 2
        assert len(set(parts)) == 1
        assert len(phase) == num_updates * parts[0]
        assert is_last == (False,) * (len(phase) - 1) + (True,)
        assert list(steps) == [step + (i + 1) // parts[0] for i in range(len(phase))]
        updates = [[*chain(*lengths[i : i + parts[0]])] for i in range(0, len(phase), parts[0])]
        reserved = 2 if max(kinds) == 2 else 0  # for the placeholder of an empty part
        assert parts[0] == max(least_number(update, BUDGET - reserved) for update in updates)
        step += num_updates
    assert len({phase[0][3] for phase in spy.phases}) > 1  # phases differ
    assert run.trainer.accumulate_grad_batches == 1  # restored
    assert run.trainer.callback_metrics["update/micro_batches"] == spy.phases[-1][0][3]


def test_a_trainer_can_fit_again(tiny_run):
    run = tiny_run(data={"max_tokens_per_micro_batch": BUDGET}, trainer={"max_epochs": 1}).fit()
    run.trainer.fit_loop.max_epochs = 2
    run.fit()
    assert run.trainer.current_epoch == 2


# Resuming


def make_run(tiny_run, folder, *callbacks, module=None, budget=BUDGET, staleness=0, **checkpoint):
    save = PhaseCheckpoint(dirpath=folder, save_top_k=-1, **(checkpoint or {"every_n_epochs": 1}))
    data = {"num_ppo_epochs": 2, "max_tokens_per_micro_batch": budget, "max_staleness": staleness}
    trainer = {"max_epochs": 4, "enable_checkpointing": True}
    stages = StageTransition(after_epochs=2, save_checkpoint=False)
    return tiny_run(stages, save, *callbacks, module=module, data=data, trainer=trainer)


def weights(run):
    return {name: value.clone() for name, value in run.module.state_dict().items()}


@pytest.mark.parametrize(("method", "staleness"), [("egspo", 1), *slow(("egspo", 0), ("ppo", 0))])
def test_resuming_is_bit_identical(tiny_run, tmp_path, method, staleness):
    """From mid-epoch checkpoints and between phases; the last step of a phase is saved after the phase."""
    settings = {"module": METHODS[method], "staleness": staleness}
    passes = Passes()
    run = make_run(tiny_run, tmp_path / "whole", passes, **settings, every_n_train_steps=1).fit()
    expected, whole = weights(run), passes.phases
    saved = sorted((tmp_path / "whole").glob("epoch*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))
    assert len(saved) == run.trainer.global_step == 12
    assert len({phase[0][3] for phase in whole}) > 1
    within = 0
    for path in (saved[i - 1] for i in (1, 2, 4, 5, 7, 11)):  # phases end after steps 2, 4 and 8
        rest_passes = Passes()
        rest_passes.phases.append([])  # a resumed phase does not call on_train_epoch_start
        rest = make_run(tiny_run, tmp_path / path.stem, rest_passes, **settings)
        torch.manual_seed(99)
        rest.fit(ckpt_path=path, weights_only=True)
        assert all(torch.equal(value, expected[name]) for name, value in weights(rest).items()), path.stem
        assert rest.trainer.global_step == 12
        done = [step for phase in rest_passes.phases for step in phase]
        assert done == [step for phase in whole for step in phase][-len(done) :]
        within += bool(rest_passes.phases[0])
    assert within == 4


@pytest.mark.parametrize(("before", "after"), [(BUDGET, 61), (BUDGET, None), (None, BUDGET)])
def test_resuming_within_a_phase_needs_the_same_budget(tiny_run, tmp_path, before, after):
    make_run(tiny_run, tmp_path, budget=before, every_n_train_steps=1).fit()
    names = ["null" if value is None else str(value) for value in (before, after)]
    message = rf"max_tokens_per_micro_batch = {names[0]}, and this config has {names[1]}\. Resume with the"
    with pytest.raises(UserError, match=message):
        make_run(tiny_run, tmp_path / "rest", budget=after).fit(ckpt_path=tmp_path / "epoch=2-step=5.ckpt")


def test_the_budget_may_change_between_phases(tiny_run, tmp_path):
    make_run(tiny_run, tmp_path / "whole", budget=None).fit()
    spy = Passes()
    run = make_run(tiny_run, tmp_path / "rest", spy, budget=BUDGET)
    run.fit(ckpt_path=tmp_path / "whole" / "epoch=1-step=4.ckpt")
    assert run.trainer.global_step == 12
    assert max(step[2] for phase in spy.phases for step in phase) <= BUDGET


# Invalid settings


@pytest.mark.parametrize(
    ("budget", "module", "trainer", "message"),
    [
        (27, {}, {}, r"data\.max_tokens_per_micro_batch must be at least 28, the longest row.* got 27"),
        (25, METHODS["grpo"], {}, r"must be at least 26, .*data\.max_prompt_length .* got 25"),
        (0, {}, {}, r"data\.max_tokens_per_micro_batch must be at least 28"),
        (60, {}, {"accumulate_grad_batches": 2}, r"accumulate_grad_batches = 2 .* Leave out accumulate_grad_batches"),
        (60, {}, {"limit_train_batches": 4}, r"limit_train_batches = 4 counts micro-batches"),
    ],
)
def test_invalid_settings_are_refused(tiny_run, budget, module, trainer, message):
    with pytest.raises(UserError, match=message):
        tiny_run(module=module, data={"max_tokens_per_micro_batch": budget}, trainer=trainer).fit()


def test_the_smallest_valid_budget_works(tiny_run):
    passes = Passes()
    data = {"max_tokens_per_micro_batch": 26}
    tiny_run(passes, module=METHODS["grpo"] | {"initial_stage": "egspo"}, data=data, trainer={"max_epochs": 1}).fit()
    assert max(step[2] for step in passes.phases[0]) <= 26
