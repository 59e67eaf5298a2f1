"""Optimizations of speed do not change losses: runs with the same seed, with and without each of them."""

import pytest
import torch
from lightning.pytorch import Callback

from egspo_lightning.models import batched_forward, packed_layout, policy
from egspo_lightning.models import packed_attention as packing
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.module import EGSPOModule
from egspo_lightning.ops import logit_tiles, token_stats
from egspo_lightning.ops.batching import row_lengths
from egspo_lightning.ops.estimators import GAE
from egspo_lightning.ops.objective import Objective
from egspo_lightning.rollout import token_sampling as drawing
from egspo_lightning.rollout import transformers_engine
from spies import RL, Spy, distance


def losses_of(tiny_run, module=None, **settings):
    """Losses of all optimizer steps of two rollout batches."""
    losses = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    spy = Spy()
    module = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05), **RL, **(module or {})}
    tiny_run(Watch(), spy, module=module, trainer={"max_epochs": 2}, **settings).fit()
    return losses, spy


def test_losses_are_the_same_with_and_without_a_scoring_pass(tiny_run, monkeypatch):
    scored = []
    score = EGSPOModule.score
    monkeypatch.setattr(EGSPOModule, "score", lambda self, *batch: scored.append(1) or score(self, *batch))
    without, spy = losses_of(tiny_run)
    assert len(scored) == 1  # by the start probe
    monkeypatch.setattr(EGSPOModule, "takes_sampled_statistics", False)
    with_scoring, other = losses_of(tiny_run)
    assert len(scored) > 2
    assert len(without) == 4
    assert max(abs(loss) for loss in without) > 1e-2
    assert without == pytest.approx(with_scoring, rel=0, abs=1e-5)
    assert distance(spy.weights[-1], other.weights[-1]) < 1e-5


@pytest.mark.parametrize("part", ["reference", "critic", "expert", "bfloat16"])
def test_a_scoring_pass_runs_if_the_engine_lacks_statistics(tiny_run, monkeypatch, part):
    scored = []
    score = EGSPOModule.score
    monkeypatch.setattr(EGSPOModule, "score", lambda self, *batch: scored.append(1) or score(self, *batch))
    module = {
        "reference": {"objective": Objective(beta=0.1)},
        "critic": {"advantage": GAE(), "critic": CriticConfig()},
    }.get(part, {})
    data = {"expert_fraction": 0.25} if part == "expert" else {}
    trainer = {"max_epochs": 1} | ({"precision": "bf16-mixed"} if part == "bfloat16" else {})
    tiny_run(module=RL | module, data=data, trainer=trainer).fit()
    assert len(scored) > 1  # once by the start probe


def test_losses_do_not_depend_on_shrinking_the_decode_batch(tiny_run, monkeypatch):
    usual, _ = losses_of(tiny_run)
    monkeypatch.setattr(transformers_engine, "SHRINK_BELOW", 0.0)
    assert losses_of(tiny_run)[0] == pytest.approx(usual, rel=0, abs=1e-5)


def test_losses_do_not_depend_on_tiles(tiny_run, monkeypatch):
    usual, _ = losses_of(tiny_run)
    monkeypatch.setattr(logit_tiles, "CPU_TILE", 300)
    monkeypatch.setattr(logit_tiles, "TILE_TOKENS", 7)
    assert losses_of(tiny_run)[0] == pytest.approx(usual, rel=0, abs=1e-5)


def test_losses_do_not_depend_on_skipping_flat_groups(tiny_run, monkeypatch):
    class OneGroup:
        """All groups are flat except the first."""

        def __call__(self, completions, golds):
            return [float(i in (0, 3)) for i in range(len(completions))]

    left_out, spy = losses_of(tiny_run, data={"reward": OneGroup()})
    monkeypatch.setattr(EGSPOModule, "needs_every_rollout", True)
    kept, other = losses_of(tiny_run, data={"reward": OneGroup()})
    assert len(spy.batches[0].rollout.input_ids) < len(other.batches[0].rollout.input_ids)
    assert left_out == pytest.approx(kept, rel=0, abs=1e-5)


def test_losses_do_not_depend_on_batching_by_length(tiny_run, monkeypatch):
    def alone(lengths, batch_cost):
        return [[row] for row in sorted(range(len(lengths)), key=lambda row: lengths[row])]

    together, _ = losses_of(tiny_run, data={"num_minibatches": 1})
    monkeypatch.setattr(packed_layout, "similar_length_batches", alone)
    split, spy = losses_of(tiny_run, data={"num_minibatches": 1})
    assert len({int(length) for length in row_lengths(spy.batches[0].rollout.completion_mask)}) > 1
    assert split == pytest.approx(together, rel=0, abs=1e-5)


@pytest.mark.parametrize("tiles", ["one", "many"])
def test_losses_do_not_depend_on_unused_entropies(tiny_run, monkeypatch, tiles):
    if tiles == "many":
        monkeypatch.setattr(logit_tiles, "CPU_TILE", 300)
        monkeypatch.setattr(logit_tiles, "TILE_TOKENS", 7)
    asked = []
    measure = policy.token_stats
    monkeypatch.setattr(policy, "token_stats", lambda *a, **k: asked.append(k["with_entropies"]) or measure(*a, **k))
    without, spy = losses_of(tiny_run)
    assert not any(asked[1:])  # the start probe scores once; then the engine returned those of sampling
    asked.clear()
    loss = EGSPOModule._hybrid_loss
    monkeypatch.setattr(EGSPOModule, "_hybrid_loss", lambda *a, with_entropies: loss(*a, with_entropies=True))
    with_them, other = losses_of(tiny_run)
    assert any(asked[1:])
    assert without == pytest.approx(with_them, rel=0, abs=1e-5)
    assert distance(spy.gradients[0], other.gradients[0]) < 1e-6


@pytest.mark.parametrize("critic", [None, "shared", "own"])
def test_losses_do_not_depend_on_packing(tiny_run, monkeypatch, critic):
    module = {} if critic is None else {"advantage": GAE(), "critic": CriticConfig(trunk=critic)}
    packed, spy = losses_of(tiny_run, module=module)
    assert spy.attention == packing.NAME
    monkeypatch.setattr(batched_forward, "use_packing", lambda lm: False)
    apart, other = losses_of(tiny_run, module=module)
    assert other.attention == "sdpa"
    assert apart == pytest.approx(packed, rel=0, abs=1e-5)
    assert distance(spy.gradients[0], other.gradients[0]) < 1e-5


@pytest.mark.parametrize("critic", [None, "shared", "own"])
def test_losses_do_not_depend_on_shared_prompts(tiny_run, monkeypatch, critic):
    module = {} if critic is None else {"advantage": GAE(), "critic": CriticConfig(trunk=critic)}
    monkeypatch.setattr(batched_forward, "PACKED_WORTH", 4)  # these runs are small
    used = []
    with_prompts = packing._with_prompts
    monkeypatch.setattr(
        packing, "_with_prompts", lambda run, *rest: used.append(run.prompts) or with_prompts(run, *rest)
    )
    shared, spy = losses_of(tiny_run, module=module)
    assert sum(prompts is not None for prompts in used) > 8
    used.clear()
    monkeypatch.setattr(batched_forward, "keeps_states_with_shared_prompts", lambda lm: False)
    apart, other = losses_of(tiny_run, module=module)
    assert used
    assert not any(used)
    assert apart == pytest.approx(shared, rel=0, abs=1e-5)
    for ours, theirs in zip(spy.gradients, other.gradients, strict=True):
        assert distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("critic", [None, "shared", "own"])
def test_losses_do_not_depend_on_plain_matrix_products_in_short_attention(tiny_run, monkeypatch, critic):
    module = {} if critic is None else {"advantage": GAE(), "critic": CriticConfig(trunk=critic)}
    used = []
    short = packing._short_attention
    monkeypatch.setattr(packing, "_short_attention", lambda *states: used.append(1) or short(*states))
    plain, spy = losses_of(tiny_run, module=module)
    assert used
    used.clear()
    monkeypatch.setattr(packing, "SHORT", 0)
    fused, other = losses_of(tiny_run, module=module)
    assert not used
    assert fused == pytest.approx(plain, rel=0, abs=1e-5)
    assert distance(spy.gradients[0], other.gradients[0]) < 1e-5


def test_losses_do_not_depend_on_shared_passes_of_rollouts_and_experts(tiny_run, monkeypatch):
    parts = []
    together = policy.Policy.together
    monkeypatch.setattr(
        policy.Policy, "together", lambda self, *batches: parts.append(len(batches)) or together(self, *batches)
    )
    shared, _ = losses_of(tiny_run)
    assert set(parts) == {2}
    monkeypatch.setattr(policy.Policy, "together", lambda self, *batches: [together(self, b)[0] for b in batches])
    assert losses_of(tiny_run)[0] == pytest.approx(shared, rel=0, abs=1e-5)


def test_losses_do_not_depend_on_keeping_probabilities_for_the_backward_pass(tiny_run, monkeypatch):
    kept, spy = losses_of(tiny_run)
    monkeypatch.setattr(logit_tiles.LogitTiles, "is_single", False)
    made_anew, other = losses_of(tiny_run)
    assert made_anew == pytest.approx(kept, rel=0, abs=1e-5)
    assert distance(spy.gradients[0], other.gradients[0]) < 1e-6


def test_losses_do_not_depend_on_sharing_the_softmax_of_draw_and_statistics(tiny_run, monkeypatch):
    class DrawnApart(drawing.TokenSampler):
        def draw(self, logits, uniforms, rows, running):
            super().draw(logits, uniforms, rows, running)
            probs = torch.softmax(logits / self._temperature, -1)
            tokens = torch.searchsorted(probs.cumsum(-1), uniforms.unsqueeze(1), right=True).squeeze(1)
            self.apart = [*getattr(self, "apart", []), (logits.clone(), tokens)]
            return tokens

        def _statistics(self, tokens):
            logits, drawn = (torch.cat(parts) for parts in zip(*self.apart, strict=True))
            self.apart = []
            assert torch.equal(tokens, drawn)
            return token_stats.token_stats_from_logits(logits, drawn, temperature=self._temperature)

    at_once, spy = losses_of(tiny_run)
    monkeypatch.setattr(transformers_engine, "TokenSampler", DrawnApart)
    apart, other = losses_of(tiny_run)
    assert_same_rollouts(at_once, spy, apart, other)


def test_losses_do_not_depend_on_batched_statistics_of_decode_steps(tiny_run, monkeypatch):
    together, spy = losses_of(tiny_run)
    monkeypatch.setattr(drawing, "MAX_PENDING", 0)
    alone, other = losses_of(tiny_run)
    assert_same_rollouts(together, spy, alone, other)


def assert_same_rollouts(losses, spy, other_losses, other) -> None:
    assert other_losses == pytest.approx(losses, rel=0, abs=1e-5)
    one, two = (found.batches[0].rollout for found in (spy, other))
    assert torch.equal(one.input_ids, two.input_ids)
    assert torch.allclose(one.old_logprobs, two.old_logprobs, atol=1e-5)
    assert torch.allclose(one.entropies, two.entropies, atol=1e-5)


def test_losses_do_not_depend_on_prompts_that_are_computed_once(tiny_run, monkeypatch):
    once, _ = losses_of(tiny_run)
    monkeypatch.setattr(transformers_engine, "groupby", lambda prompts: [(prompt, [prompt]) for prompt in prompts])
    assert losses_of(tiny_run)[0] == pytest.approx(once, rel=0, abs=1e-5)


def test_losses_do_not_depend_on_the_fused_optimizer(tiny_run):
    runs = {}
    for fused in (None, False):
        settings = {"optimizer": lambda params, fused=fused: torch.optim.AdamW(params, lr=1e-2, fused=fused)}
        losses, spy = losses_of(tiny_run, module=settings)
        runs[fused] = losses, spy.weights[-1], spy.fused
    assert runs[None][2] is True
    assert runs[False][2] is False
    assert runs[None][0] == pytest.approx(runs[False][0], rel=0, abs=1e-5)
    assert distance(runs[None][1], runs[False][1]) < 1e-5


def test_losses_do_not_depend_on_logging_once_a_phase(tiny_run, monkeypatch):
    """The logged value is the mean over the optimizer steps of the phase."""
    logged, spy = losses_of(tiny_run)
    assert spy.metrics[0]["loss/total"] == pytest.approx(sum(logged[2:]) / 2, abs=1e-6)

    def at_every_step(self, outputs, batch, batch_idx):
        self.log_dict(self.reduce_over_ranks(self._phase.take()))

    monkeypatch.setattr(EGSPOModule, "on_train_batch_end", at_every_step)
    losses, other = losses_of(tiny_run)
    assert losses == logged
    assert other.metrics[0]["loss/total"] == pytest.approx(losses[-1], abs=1e-6)
