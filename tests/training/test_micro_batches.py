import itertools
from collections import Counter, namedtuple

import pytest
import torch

from egspo_lightning.ops.batching import balanced_batches
from egspo_lightning.training.micro_batches import (
    RolloutShare,
    StepShare,
    count_steps,
    plan_optimizer_steps,
    share_optimizer_steps,
)
from egspo_lightning.types import RolloutBatch, UpdateSize

SHAPES = [
    (4, 4, 2, 1),
    (4, 4, 2, 3),
    (16, 8, 4, 2),
    (6, 5, 3, 2),  # group size not divisible by the number of minibatches
    (4, 2, 4, 2),  # more minibatches than completions in a group
    (2, 3, 1, 2),
]
"""(problems, generations, minibatches, PPO epochs)"""


def as_pairs(steps: list[list[int]], numbers: range, num_generations: int) -> list[set[tuple[int, int]]]:
    """Rows as (problem, completion) pairs."""
    return [{(numbers[row // num_generations], row % num_generations) for row in rows} for rows in steps]


@pytest.mark.parametrize(("problems", "generations", "minibatches", "epochs"), SHAPES)
def test_every_completion_is_used_once_per_ppo_epoch(problems, generations, minibatches, epochs):
    steps = plan_optimizer_steps(range(problems), generations, minibatches, epochs, seed="1/0")
    assert len(steps) == epochs * minibatches
    for epoch in range(epochs):
        rows = itertools.chain(*steps[epoch * minibatches : (epoch + 1) * minibatches])
        assert Counter(rows) == Counter(range(problems * generations))


@pytest.mark.parametrize(("problems", "generations", "minibatches", "epochs"), SHAPES)
def test_every_step_takes_an_even_share_of_each_group(problems, generations, minibatches, epochs):
    for rows in plan_optimizer_steps(range(problems), generations, minibatches, epochs, seed="1/0"):
        shares = [sum(row // generations == i for row in rows) for i in range(problems)]
        assert set(shares) <= {generations // minibatches, -(-generations // minibatches)}


@pytest.mark.parametrize(("problems", "generations", "minibatches", "epochs"), SHAPES)
def test_steps_hold_the_same_completions_on_one_and_two_ranks(problems, generations, minibatches, epochs):
    def plan(numbers: range) -> list[set[tuple[int, int]]]:
        steps = plan_optimizer_steps(numbers, generations, minibatches, epochs, seed="1/0")
        return as_pairs(steps, numbers, generations)

    one_rank = plan(range(problems))
    first, second = plan(range(0, problems, 2)), plan(range(1, problems, 2))
    assert [a | b for a, b in zip(first, second, strict=True)] == one_rank
    assert not any(a & b for a, b in zip(first, second, strict=True))


def test_no_step_is_empty_if_there_are_enough_completions():
    for problems, generations in itertools.product(range(1, 6), range(1, 7)):
        for minibatches in range(1, problems * generations + 1):
            steps = plan_optimizer_steps(range(problems), generations, minibatches, 1, seed="s")
            assert all(steps), (problems, generations, minibatches)


def test_step_order_depends_on_seed_and_epoch():
    plan = plan_optimizer_steps(range(4), 8, 2, 2, seed="1/0")
    assert plan == plan_optimizer_steps(range(4), 8, 2, 2, seed="1/0")
    assert plan != plan_optimizer_steps(range(4), 8, 2, 2, seed="1/1")
    assert {frozenset(rows) for rows in plan[:2]} != {frozenset(rows) for rows in plan[2:]}


def test_expert_row_is_used_once_per_ppo_epoch_in_rotating_steps():
    numbers = [1, 3, 5, 7]  # problem numbers of the second of two ranks
    plan = plan_optimizer_steps(numbers, 2, 3, 4, seed="1/0", expert_groups=[0, 2])
    assert plan_optimizer_steps(numbers, 2, 3, 4, seed="1/0") == [[row for row in rows if row < 8] for rows in plan]
    for epoch in range(4):
        found = {row: k for k, rows in enumerate(plan[3 * epoch : 3 * epoch + 3]) for row in rows if row >= 8}
        assert found == {8: (1 + epoch) % 3, 9: (5 + epoch) % 3}


def test_expert_tokens_count_as_active_but_not_as_sampled():
    steps = [[0, 3], [1, 2], [4]]  # the last two rows are expert rows; the last one has advantage 0
    counts = count_steps(rollout_batch(num_experts=2), steps, keep_inactive=False)
    assert counts.tolist() == [[7.0, 2.0, 7.0, 3.0], [3.0, 2.0, 2.0, 2.0], [2.0, 1.0, 0.0, 0.0]]
    everything = count_steps(rollout_batch(num_experts=2), steps, keep_inactive=True)
    assert everything[:, 2:].tolist() == [[7.0, 3.0], [3.0, 3.0], [2.0, 0.0]]


def test_every_step_gets_its_size_over_all_ranks():
    whole, plan = rollout_batch(num_experts=1), [[0, 4], [1, 2, 3]]
    shares = share_optimizer_steps(whole, plan, keep_inactive=False, total=lambda counts: 2 * counts)
    sizes = [UpdateSize(10.0, 4.0, 4.0, 6.0, 6.0), UpdateSize(14.0, 6.0, 4.0, 12.0, 12.0)]
    assert [share.rollout.update_size for share in shares] == sizes
    assert [share.batch([0]).update_size for share in shares] == sizes
    assert [(share.rows, share.lengths) for share in shares] == [([0], [5]), ([2, 3], [4, 5])]


# A rollout batch of five rows by hand: prompt lengths 2, 1, 2, 1, 2; completion lengths 3, 1, 2, 4, 2

PROMPTS, COMPLETIONS = [2, 1, 2, 1, 2], [3, 1, 2, 4, 2]
ADVANTAGES = [1.0, 0.0, -1.0, 0.5, 0.0]
WIDTH = 6


def rollout_batch(with_reference: bool = False, num_experts: int = 0) -> RolloutBatch:
    mask = torch.zeros(5, WIDTH, dtype=torch.bool)
    for row, (start, length) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        mask[row, start : start + length] = True
    grid = torch.arange(5 * WIDTH).view(5, WIDTH)  # each value identifies its row and column
    return RolloutBatch(
        input_ids=grid,
        completion_mask=mask,
        old_logprobs=-1.0 * grid,
        entropies=0.5 * grid,
        ref_logprobs=-2.0 * grid if with_reference else None,
        advantages=torch.tensor(ADVANTAGES).unsqueeze(1) * mask,
        rewards=torch.tensor([10.0, 11.0, 12.0, 13.0, 14.0]),
        returns=3.0 * grid if with_reference else None,
        old_values=4.0 * grid if with_reference else None,
        is_expert=torch.tensor([False] * (5 - num_experts) + [True] * num_experts),
        is_masked=torch.zeros(5, dtype=torch.bool),
        is_truncated=torch.arange(5) % 2 == 1,
        groups=20 + torch.arange(5),
        members=30 + torch.arange(5),
        threshold=0.1 * torch.arange(5).unsqueeze(1),
        is_high=grid % 2 == 0,
        high_weights=5.0 * grid,
        low_weights=6.0 * grid,
        weight_scale=1.0 + torch.arange(5).unsqueeze(1),
        policy_version=3,
        update_size=UpdateSize(0, 0, 4.0, 0, 0),
        sampled_logprobs=-3.0 * grid if with_reference else None,
    )


def micro_batches(rollout: RolloutBatch, rows: list[int], parts: int, keep_inactive: bool) -> list[RolloutBatch]:
    """Split an optimizer step on the given rows into micro-batches."""
    (share,) = share_optimizer_steps(rollout, [rows], keep_inactive=keep_inactive, total=lambda counts: counts)
    return [share.batch(run) for run in balanced_batches(share.lengths, parts)]


def rows_of(batch: RolloutBatch) -> list[int]:
    return (batch.input_ids[:, 0] // WIDTH).tolist()


def test_advantage_outside_the_completion_does_not_make_a_row_active():
    rollout = rollout_batch()
    rollout.advantages[1, 0] = 5.0
    assert count_steps(rollout, [[1]], keep_inactive=False).tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_step_sizes_by_hand():
    steps = [[0, 1], [2, 3, 4], [1, 4], []]
    counts = count_steps(rollout_batch(), steps, keep_inactive=False)
    assert counts.tolist() == [
        [4.0, 2.0, 3.0, 3.0],
        [8.0, 3.0, 6.0, 6.0],
        [3.0, 2.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    assert counts.dtype == torch.float64
    everything = count_steps(rollout_batch(), steps, keep_inactive=True)
    assert everything[:, 2].tolist() == everything[:, 0].tolist() == [4.0, 8.0, 3.0, 0.0]


def test_inactive_rows_are_skipped_but_counted_in_the_step_size():
    (batch,) = micro_batches(rollout_batch(), [0, 1, 2, 3, 4], 1, keep_inactive=False)
    assert sorted(rows_of(batch)) == [0, 2, 3]
    assert batch.update_size == UpdateSize(12.0, 5.0, 4.0, 9.0, 9.0)


def test_keep_inactive_keeps_inactive_rows():
    batches = micro_batches(rollout_batch(), [0, 1, 2, 3, 4], 2, keep_inactive=True)
    assert sorted(rows_of(batches[0]) + rows_of(batches[1])) == [0, 1, 2, 3, 4]


def test_micro_batches_hold_rows_of_similar_length_truncated_to_the_longest():
    # sequences end at 5, 2, 4, 5, 4
    batches = micro_batches(rollout_batch(True), [3, 1, 0, 4, 2], 3, keep_inactive=True)
    assert [rows_of(batch) for batch in batches] == [[1, 4], [2, 3], [0]]
    assert [batch.input_ids.shape[1] for batch in batches] == [4, 5, 5]


def test_micro_batch_holds_its_rows_of_every_field():
    whole = rollout_batch(True, num_experts=2)
    for batch in micro_batches(whole, [3, 1, 0, 4, 2], 3, keep_inactive=True):
        rows, width = rows_of(batch), batch.input_ids.shape[1]
        per_token = ("input_ids", "completion_mask", "old_logprobs", "entropies", "ref_logprobs", "advantages")
        for field in (
            *per_token,
            "returns",
            "old_values",
            "sampled_logprobs",
            "is_high",
            "high_weights",
            "low_weights",
        ):
            assert torch.equal(getattr(batch, field), getattr(whole, field)[rows, :width]), field
        for field in ("rewards", "is_expert", "groups", "members", "threshold", "weight_scale"):
            assert torch.equal(getattr(batch, field), getattr(whole, field)[rows]), field
        assert batch.completion_mask.sum() == whole.completion_mask[rows].sum()  # no completion token is lost
        assert batch.policy_version == 3


def test_micro_batch_selects_rows_of_unknown_fields():
    """Rows and tokens of every tensor field are selected, including fields that are added later."""
    new = {"per_token": 5.0 * rollout_batch().input_ids, "per_row": torch.arange(5), "per_run": "kept", "absent": None}
    Wider = namedtuple("Wider", [*RolloutBatch._fields, *new])
    wider = Wider(**rollout_batch(True)._asdict(), **new)
    batch = RolloutShare(wider, [3, 0, 2], [5, 5, 4]).batch([2, 0])
    assert batch.input_ids[:, 0].tolist() == [2 * WIDTH, 3 * WIDTH]
    assert torch.equal(batch.per_token, 5.0 * batch.input_ids)
    assert batch.per_row.tolist() == [2, 3]
    assert (batch.per_run, batch.absent) == ("kept", None)
    tensors = {name: value for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)}
    assert {len(value) for value in tensors.values()} == {2}
    assert {value.shape[1] for value in tensors.values() if value.dim() == 2} == {5, 1}


@pytest.mark.parametrize("rows", [[1, 4], []])
def test_micro_batch_without_rows_is_one_masked_row(rows):
    for batch in micro_batches(rollout_batch(), rows, 2, keep_inactive=False):
        assert batch.input_ids.shape[0] == 1
        assert batch.input_ids.shape[1] >= 2
        assert not batch.completion_mask.any()
        assert batch.update_size.num_sequences == len(rows)


def test_more_micro_batches_than_rows_add_empty_ones():
    batches = micro_batches(rollout_batch(), [0, 3], 4, keep_inactive=False)
    assert len(batches) == 4
    assert sum(int(batch.completion_mask.sum()) for batch in batches) == 3 + 4


def test_micro_batches_do_not_change_the_rollout_batch():
    whole = rollout_batch()
    micro_batches(whole, [1, 4], 1, keep_inactive=False)
    assert torch.equal(whole.completion_mask, rollout_batch().completion_mask)


def test_row_longer_than_the_budget_raises_assertion_error():
    (share,) = share_optimizer_steps(rollout_batch(), [[0, 3]], keep_inactive=True, total=lambda counts: counts)
    with pytest.raises(AssertionError, match="longer than a micro-batch may be"):
        StepShare(share, None).num_needed(max(share.lengths) - 1)
