import pytest
import torch

from egspo_lightning.rollout import scoring
from egspo_lightning.rollout.rollout_records import Group, Prompt, SampledGroups
from egspo_lightning.rollout.scoring import completions_by_row, measure
from egspo_lightning.types import Completion, Problem

PROBLEM = Problem("1", "1+1=?", "2")


def completion(length: int, reward: float, **fields) -> Completion:
    status = fields.pop("status", "graded")
    return Completion(
        problem=PROBLEM,
        token_ids=[7] * length,
        logprobs=[0.0] * length,
        text="",
        is_truncated=fields.pop("is_truncated", False),
        reward=reward,
        correct=reward > 0.5,
        extracted=None,
        status=status,
        reward_terms={"mine": 2 * reward},
    )


def sampled(
    completions: list[Completion], size: int, num_discarded: int = 0, expert: int | None = None
) -> SampledGroups:
    """Groups of ``size`` completions. The last ``num_discarded`` are discarded; group ``expert`` has an expert."""
    groups = [
        Group(i, Prompt(PROBLEM, [1], ""), completions[i * size : (i + 1) * size], None)
        for i in range(len(completions) // size)
    ]
    if expert is not None:
        groups[expert] = groups[expert]._replace(expert=completion(9, 1.0, status="timeout"))
    kept = len(groups) - num_discarded
    return SampledGroups(groups[:kept], groups[kept:], 0.5, 0.125)


def test_rollout_measurements_by_hand():
    completions = [
        completion(3, 1.0),
        completion(5, 0.0, is_truncated=True),
        completion(2, 0.0, status="timeout"),
        completion(4, 0.0, status="crashed"),
        completion(6, 0.0, status="timeout"),
        completion(1, 0.0, is_truncated=True),
    ]
    found = measure(sampled(completions, 2))
    assert {name: (pytest.approx(value[0]), value[1]) for name, value in found.items()} == {
        "rollout/reward_mean": (1.0, 6),
        "rollout/reward_std": (2**-0.5, 3),  # of (1, 0), with Bessel's correction; the other groups have std 0
        "rollout/accuracy": (1, 6),
        "rollout/zero_spread_fraction": (2, 3),
        "rollout/flat_groups": (2, 0),
        "rollout/resampled_groups": (0, 0),
        "rollout/length_mean": (21, 6),
        "rollout/truncated_fraction": (2, 6),
        "rollout/grader_timeouts": (2, 0),
        "rollout/grader_crashes": (1, 0),
        "rollout/tokens_per_second": (21, 0.5),
        "time/sample": (0.375, 1),
        "time/grade": (0.125, 1),
        "rollout/reward/mine": (2.0, 6),  # unweighted
    }


def test_groups_of_one_completion_have_std_zero():
    found = measure(sampled([completion(3, 1.0), completion(5, 0.0)], 1))
    assert found["rollout/reward_std"] == (0.0, 2)
    assert found["rollout/zero_spread_fraction"] == (2, 2)


def test_measurements_include_discarded_groups_and_exclude_experts():
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]  # groups: mixed; flat; flat with an expert; flat and discarded
    found = measure(sampled([completion(2, reward) for reward in rewards], 2, num_discarded=1, expert=2))
    assert found["rollout/reward_mean"] == (3.0, 8)
    assert found["rollout/zero_spread_fraction"] == (3, 4)
    assert found["rollout/flat_groups"] == (1, 0)
    assert found["rollout/resampled_groups"] == (1, 0)
    assert found["rollout/length_mean"] == (16, 8)
    assert found["rollout/grader_timeouts"] == (0, 0)


def test_expert_rows_follow_the_sampled_rows():
    completions = [completion(i + 1, 0.0) for i in range(4)]
    rows = completions_by_row(sampled(completions, 2, expert=0).groups)
    assert [len(row.token_ids) for row in rows] == [1, 2, 3, 4, 9]


@pytest.mark.parametrize("tokens_per_scoring_batch", [16_384, 40, 1])
def test_rollout_batch_matches_naive_loop(tiny_run, monkeypatch, tokens_per_scoring_batch):
    """With a learning rate of 0, the rollout batch can be recomputed row by row from the final weights."""
    monkeypatch.setattr(scoring, "TOKENS_PER_SCORING_BATCH", tokens_per_scoring_batch)
    no_updates = {
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.0),
        "initial_stage": "egspo",
        "temperature": 0.8,
    }
    run = tiny_run(module=no_updates, trainer={"max_epochs": 1}).fit()
    rollouts, tokenizer = run.data.phases.rollouts, run.module.tokenizer
    rollout, completions = rollouts.batch, rollouts.completions
    assert len(completions) == rollout.input_ids.shape[0] == 16
    assert len({len(c.token_ids) for c in completions}) > 1

    rewards = torch.tensor([c.reward for c in completions]).view(4, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    for row, c in enumerate(completions):
        assert c.problem == completions[row // 4 * 4].problem  # completions of a problem are adjacent
        prompt = tokenizer.encode(c.problem.problem)
        sequence = torch.tensor([*prompt, *c.token_ids])
        start, end = len(prompt), len(sequence)
        with torch.no_grad():
            logits = run.module.policy.lm(input_ids=sequence[None]).logits[0].double() / 0.8
        table = torch.log_softmax(logits, -1)[start - 1 : end - 1]
        chosen = table.gather(1, sequence[start:, None])[:, 0]
        entropies = -(table.exp() * table).sum(1)
        inside = torch.zeros(rollout.input_ids.shape[1], dtype=torch.bool)
        inside[start:end] = True

        assert torch.equal(rollout.completion_mask[row], inside)
        assert torch.equal(rollout.input_ids[row, :end], sequence)
        assert (rollout.input_ids[row, end:] == tokenizer.pad_token_id).all()
        torch.testing.assert_close(rollout.old_logprobs[row, start:end].double(), chosen, rtol=0, atol=1e-5)
        torch.testing.assert_close(rollout.entropies[row, start:end].double(), entropies, rtol=0, atol=1e-5)
        assert not rollout.old_logprobs[row, ~inside].any()
        assert rollout.advantages[row, start:end].tolist() == pytest.approx(
            [advantages.flatten()[row].item()] * (end - start), abs=1e-5
        )
        assert not rollout.advantages[row, ~inside].any()
        assert rollout.rewards[row].item() == pytest.approx(c.reward)
        assert c.is_truncated == (c.token_ids[-1] != tokenizer.eos_token_id)
        assert not c.is_truncated or len(c.token_ids) == 18
        assert c.text == tokenizer.decode(c.token_ids, skip_special_tokens=True)
    assert rollout.policy_version == 0
    assert rollout.ref_logprobs is None


def test_rollout_batch_has_reference_logprobs_if_beta_is_positive(tiny_run):
    from egspo_lightning.ops.objective import Objective

    run = tiny_run(module={"objective": Objective(beta=0.1), "initial_stage": "egspo"}, trainer={"max_epochs": 2}).fit()
    rollout = run.data.phases.rollouts.batch
    with torch.no_grad():
        expected = run.module.reference(rollout.input_ids, rollout.completion_mask, 1.0).logprobs
    torch.testing.assert_close(rollout.ref_logprobs, expected, rtol=0, atol=1e-5)
    assert (rollout.ref_logprobs - rollout.old_logprobs).abs().max() > 1e-3  # the policy has moved away from it
