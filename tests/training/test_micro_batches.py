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
    (6, 5, 3, 2),  # groups that do not divide evenly
    (4, 2, 4, 2),  # more updates than completions in a group
    (2, 3, 1, 2),
]
"""(problems, generations, minibatches, PPO epochs)"""


def named(updates: list[list[int]], numbers: range, num_generations: int) -> list[set[tuple[int, int]]]:
    """Rows as (problem, completion)."""
    return [{(numbers[row // num_generations], row % num_generations) for row in rows} for rows in updates]


@pytest.mark.parametrize(("problems", "generations", "minibatches", "epochs"), SHAPES)
def test_every_completion_comes_exactly_once_an_epoch(problems, generations, minibatches, epochs):
    updates = plan_optimizer_steps(range(problems), generations, minibatches, epochs, seed="1/0")
    assert len(updates) == epochs * minibatches
    for epoch in range(epochs):
        rows = itertools.chain(*updates[epoch * minibatches : (epoch + 1) * minibatches])
        assert Counter(rows) == Counter(range(problems * generations))


@pytest.mark.parametrize(("problems", "generations", "minibatches", "epochs"), SHAPES)
def test_every_update_takes_an_even_share_of_each_group(problems, generations, minibatches, epochs):
    for rows in plan_optimizer_steps(range(problems), generations, minibatches, epochs, seed="1/0"):
        shares = [sum(row // generations == i for row in rows) for i in range(problems)]
        assert set(shares) <= {generations // minibatches, -(-generations // minibatches)}


@pytest.mark.parametrize(("problems", "generations", "minibatches", "epochs"), SHAPES)
def test_an_update_holds_the_same_completions_on_one_rank_and_on_two(problems, generations, minibatches, epochs):
    def plan(numbers: range) -> list[set[tuple[int, int]]]:
        updates = plan_optimizer_steps(numbers, generations, minibatches, epochs, seed="1/0")
        return named(updates, numbers, generations)

    alone = plan(range(problems))
    first, second = plan(range(0, problems, 2)), plan(range(1, problems, 2))
    assert [a | b for a, b in zip(first, second, strict=True)] == alone
    assert not any(a & b for a, b in zip(first, second, strict=True))


def test_no_update_is_empty_while_there_are_completions_enough():
    for problems, generations in itertools.product(range(1, 6), range(1, 7)):
        for minibatches in range(1, problems * generations + 1):
            updates = plan_optimizer_steps(range(problems), generations, minibatches, 1, seed="s")
            assert all(updates), (problems, generations, minibatches)


def test_the_order_is_a_function_of_the_seed_and_differs_between_epochs_and_seeds():
    plan = plan_optimizer_steps(range(4), 8, 2, 2, seed="1/0")
    assert plan == plan_optimizer_steps(range(4), 8, 2, 2, seed="1/0")
    assert plan != plan_optimizer_steps(range(4), 8, 2, 2, seed="1/1")
    assert {frozenset(rows) for rows in plan[:2]} != {frozenset(rows) for rows in plan[2:]}


def test_an_experts_row_comes_once_an_epoch_each_time_in_the_next_update():
    numbers = [1, 3, 5, 7]  # of the second of two ranks
    plan = plan_optimizer_steps(numbers, 2, 3, 4, seed="1/0", expert_groups=[0, 2])
    assert plan_optimizer_steps(numbers, 2, 3, 4, seed="1/0") == [[row for row in rows if row < 8] for rows in plan]
    for epoch in range(4):
        found = {row: k for k, rows in enumerate(plan[3 * epoch : 3 * epoch + 3]) for row in rows if row >= 8}
        assert found == {8: (1 + epoch) % 3, 9: (5 + epoch) % 3}


def test_experts_tokens_are_active_and_not_sampled():
    updates = [[0, 3], [1, 2], [4]]  # the last two rows are experts', of which the last has advantage 0
    counts = count_steps(collection(num_experts=2), updates, keep_inactive=False)
    assert counts.tolist() == [[7.0, 2.0, 7.0, 3.0], [3.0, 2.0, 2.0, 2.0], [2.0, 1.0, 0.0, 0.0]]
    everything = count_steps(collection(num_experts=2), updates, keep_inactive=True)
    assert everything[:, 2:].tolist() == [[7.0, 3.0], [3.0, 3.0], [2.0, 0.0]]


def test_every_update_of_a_plan_is_stamped_with_its_size_over_all_ranks():
    whole, plan = collection(num_experts=1), [[0, 4], [1, 2, 3]]
    shares = share_optimizer_steps(whole, plan, keep_inactive=False, total=lambda counts: 2 * counts)
    sizes = [UpdateSize(10.0, 4.0, 4.0, 6.0, 6.0), UpdateSize(14.0, 6.0, 4.0, 12.0, 12.0)]
    assert [share.rollout.update_size for share in shares] == sizes
    assert [share.batch([0]).update_size for share in shares] == sizes
    assert [(share.rows, share.lengths) for share in shares] == [([0], [5]), ([2, 3], [4, 5])]


# A collection of five rows by hand: prompt lengths 1 to 2, completion lengths 3, 1, 2, 4, 2

PROMPTS, COMPLETIONS = [2, 1, 2, 1, 2], [3, 1, 2, 4, 2]
ADVANTAGES = [1.0, 0.0, -1.0, 0.5, 0.0]
WIDTH = 6


def collection(with_reference: bool = False, num_experts: int = 0) -> RolloutBatch:
    mask = torch.zeros(5, WIDTH, dtype=torch.bool)
    for row, (start, length) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        mask[row, start : start + length] = True
    grid = torch.arange(5 * WIDTH).view(5, WIDTH)  # a value that tells its row and column
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
        threshold=0.1 * torch.arange(5).unsqueeze(1),
        weight_scale=1.0 + torch.arange(5).unsqueeze(1),
        policy_version=3,
        update_size=UpdateSize(0, 0, 4.0, 0, 0),
        sampled_logprobs=-3.0 * grid if with_reference else None,
    )


def micro_batches(rollout: RolloutBatch, rows: list[int], parts: int, keep_inactive: bool) -> list[RolloutBatch]:
    """An update of some rows, in parts."""
    (share,) = share_optimizer_steps(rollout, [rows], keep_inactive=keep_inactive, total=lambda counts: counts)
    return [share.batch(run) for run in balanced_batches(share.lengths, parts)]


def rows_of(batch: RolloutBatch) -> list[int]:
    return (batch.input_ids[:, 0] // WIDTH).tolist()


def test_an_advantage_outside_the_completion_does_not_make_a_row_active():
    rollout = collection()
    rollout.advantages[1, 0] = 5.0
    assert count_steps(rollout, [[1]], keep_inactive=False).tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_updates_are_counted_by_hand():
    updates = [[0, 1], [2, 3, 4], [1, 4], []]
    counts = count_steps(collection(), updates, keep_inactive=False)
    assert counts.tolist() == [
        [4.0, 2.0, 3.0, 3.0],
        [8.0, 3.0, 6.0, 6.0],
        [3.0, 2.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    assert counts.dtype == torch.float64
    everything = count_steps(collection(), updates, keep_inactive=True)
    assert everything[:, 2].tolist() == everything[:, 0].tolist() == [4.0, 8.0, 3.0, 0.0]


def test_inactive_rows_are_left_out_and_still_counted():
    (batch,) = micro_batches(collection(), [0, 1, 2, 3, 4], 1, keep_inactive=False)
    assert sorted(rows_of(batch)) == [0, 2, 3]
    assert batch.update_size == UpdateSize(12.0, 5.0, 4.0, 9.0, 9.0)


def test_inactive_rows_are_kept_where_they_are_needed():
    batches = micro_batches(collection(), [0, 1, 2, 3, 4], 2, keep_inactive=True)
    assert sorted(rows_of(batches[0]) + rows_of(batches[1])) == [0, 1, 2, 3, 4]


def test_micro_batches_hold_rows_of_like_length_each_cut_to_its_longest():
    # sequences end at 5, 2, 4, 5, 4
    batches = micro_batches(collection(True), [3, 1, 0, 4, 2], 3, keep_inactive=True)
    assert [rows_of(batch) for batch in batches] == [[1, 4], [2, 3], [0]]
    assert [batch.input_ids.shape[1] for batch in batches] == [4, 5, 5]


def test_a_micro_batch_carries_its_rows_of_everything():
    whole = collection(True, num_experts=2)
    for batch in micro_batches(whole, [3, 1, 0, 4, 2], 3, keep_inactive=True):
        rows, width = rows_of(batch), batch.input_ids.shape[1]
        per_token = ("input_ids", "completion_mask", "old_logprobs", "entropies", "ref_logprobs", "advantages")
        for field in (*per_token, "returns", "old_values", "sampled_logprobs"):
            assert torch.equal(getattr(batch, field), getattr(whole, field)[rows, :width]), field
        for field in ("rewards", "is_expert", "threshold", "weight_scale"):
            assert torch.equal(getattr(batch, field), getattr(whole, field)[rows]), field
        assert batch.completion_mask.sum() == whole.completion_mask[rows].sum()  # nothing was cut off
        assert batch.policy_version == 3


def test_a_field_that_is_added_to_a_rollout_batch_cannot_be_forgotten():
    """Rows and tokens of every tensor are selected, whatever fields there are."""
    new = {"per_token": 5.0 * collection().input_ids, "per_row": torch.arange(5), "per_run": "kept", "absent": None}
    Wider = namedtuple("Wider", [*RolloutBatch._fields, *new])
    wider = Wider(**collection(True)._asdict(), **new)
    batch = RolloutShare(wider, [3, 0, 2], [5, 5, 4]).batch([2, 0])
    assert batch.input_ids[:, 0].tolist() == [2 * WIDTH, 3 * WIDTH]
    assert torch.equal(batch.per_token, 5.0 * batch.input_ids)
    assert batch.per_row.tolist() == [2, 3]
    assert (batch.per_run, batch.absent) == ("kept", None)
    tensors = {name: value for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)}
    assert {len(value) for value in tensors.values()} == {2}
    assert {value.shape[1] for value in tensors.values() if value.dim() == 2} == {5, 1}


@pytest.mark.parametrize("rows", [[1, 4], []])
def test_without_rows_a_micro_batch_is_blank(rows):
    for batch in micro_batches(collection(), rows, 2, keep_inactive=False):
        assert batch.input_ids.shape[0] == 1
        assert batch.input_ids.shape[1] >= 2
        assert not batch.completion_mask.any()
        assert batch.update_size.num_sequences == len(rows)


def test_more_micro_batches_than_rows_give_blank_ones():
    batches = micro_batches(collection(), [0, 3], 4, keep_inactive=False)
    assert len(batches) == 4
    assert sum(int(batch.completion_mask.sum()) for batch in batches) == 3 + 4


def test_micro_batches_do_not_change_the_collection():
    whole = collection()
    micro_batches(whole, [1, 4], 1, keep_inactive=False)
    assert torch.equal(whole.completion_mask, collection().completion_mask)


def test_a_row_longer_than_a_micro_batch_is_our_own_mistake():
    (share,) = share_optimizer_steps(collection(), [[0, 3]], keep_inactive=True, total=lambda counts: counts)
    with pytest.raises(AssertionError, match="longer than a micro-batch may be"):
        StepShare(share, None).num_needed(max(share.lengths) - 1)
