"""Collector with a scripted engine: which problems it draws, which groups it replaces, and their order."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from egspo_lightning.errors import UserError
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.length import SoftLengthPenalty
from egspo_lightning.rollout.collector import Collector
from egspo_lightning.rollout.engine import Sample
from egspo_lightning.types import ExpertSolution, Problem
from scripted_policy import BytePolicy

FLAT, SPREAD = "flat", "spread"


class Echo:
    """An engine whose completions are the seeds of their requests."""

    def stream(self, lm, requests, sampling, *, eos_ids, pad_id):
        streams = [list(request.seed.encode()) for request in requests]
        samples = [(i, Sample(ids, False, [0.0] * len(ids))) for i, ids in enumerate(streams)]
        yield from (samples[start : start + 3] for start in range(0, len(samples), 3))  # batches cross group boundaries


def reward_by_gold(completions, golds):
    """Equal rewards for groups with gold FLAT, else alternating 0 and 1."""
    return [1.0 if gold == FLAT else float(text[-1]) % 2 for text, gold in zip(completions, golds, strict=True)]


class OneOfTwo(BytePolicy):
    """A policy on one of two threads that sums over both. Both must enter ``sampling`` equally often."""

    def __init__(self, rank, box, barrier):
        self.rank, self.box, self.barrier = rank, box, barrier

    @contextmanager
    def sampling(self, *, whole=True):
        self.barrier.wait(timeout=10)
        yield None

    def sum_over_ranks(self, values):
        self.box[self.rank] = values
        self.barrier.wait(timeout=10)
        total = self.box[0] + self.box[1]
        self.barrier.wait(timeout=10)
        return total


def collector(flat=(), *, drawn=None, **options):
    """A collector over problems "0", "1", ...; those in ``flat`` get equal rewards. Draws are appended to ``drawn``."""

    def draw(start, count):
        if drawn is not None:
            drawn.extend(range(start, start + count))
        return [Problem(str(i), "q", FLAT if i in flat else SPREAD) for i in range(start, start + count)]

    def draw_experts(start, count):
        return [
            ExpertSolution(Problem(f"expert-{i}", "q", options.get("expert_gold", SPREAD)), [*f"solution {i}".encode()])
            for i in range(start, start + count)
        ]

    fields = {
        "engine": Echo(),
        "reward": WeightedReward.of(reward_by_gold),
        "draw": draw,
        "draw_experts": draw_experts,
        "encode": lambda problem: [1],
        "num_problems": 4,
        "num_experts": 0,
        "num_generations": 2,
        "max_completion_length": 40,
        "max_resampling": 0,
        "seed": 7,
    }
    return Collector(**fields | {k: v for k, v in options.items() if k != "expert_gold"})


def sample(source, policy, number, rank, world_size):
    """Run the steps of a rollout batch in order and return its groups."""
    drawn = source.draw_problems(number, rank, world_size)
    sampled = source.sample_and_grade(policy, drawn.prompts)
    sampled = source.replace_flat_groups(policy, drawn, sampled)
    return source.grade_expert_solutions(policy, drawn, sampled)


def ids(groups):
    return [group.prompt.problem.id for group in groups]


def test_rollout_batch_keeps_problem_order_and_one_seed_per_sample():
    drawn = []
    source = collector(drawn=drawn)
    for number in range(2):
        sampled = sample(source, BytePolicy(), number, 0, 1)
        assert ids(sampled.groups) == [str(4 * number + i) for i in range(4)]
        assert [group.number for group in sampled.groups] == [0, 1, 2, 3]
        texts = [completion.text for group in sampled.groups for completion in group.completions]
        assert texts == [f"7/{number}/{place}/{i}" for place in range(4) for i in range(2)]
        assert sampled.discarded == []
    assert drawn == list(range(8))


@pytest.mark.parametrize(
    ("max_resampling", "kept", "discarded"),
    [
        (0, ["0", "1", "2", "3"], []),
        (1, ["0", "4", "2", "5"], ["1", "3"]),
        (2, ["0", "6", "2", "5"], ["1", "3", "4"]),  # 4 is flat too
        (3, ["0", "7", "2", "5"], ["1", "3", "4", "6"]),
        (9, ["0", "7", "2", "5"], ["1", "3", "4", "6"]),  # no unnecessary rounds
    ],
)
def test_flat_groups_are_replaced_in_place_up_to_max_resampling(max_resampling, kept, discarded):
    drawn = []
    source = collector({1, 3, 4, 6}, drawn=drawn, max_resampling=max_resampling)
    sampled = sample(source, BytePolicy(), 0, 0, 1)
    assert ids(sampled.groups) == kept
    assert ids(sampled.discarded) == discarded
    assert [group.number for group in sampled.groups] == [0, 1, 2, 3]
    sample(source, BytePolicy(), 1, 0, 1)
    assert drawn == list(range(len(drawn)))  # no gaps or repeats
    assert source.num_drawn == len(drawn) >= 8 + len(discarded)


def test_rewards_that_differ_by_float64_rounding_make_a_flat_group():
    def nearly_equal(completions, golds):
        return [(0.1 + 0.2) + 0.3 if text[-1] == "0" else 0.1 + (0.2 + 0.3) for text in completions]

    sampled = sample(collector(reward=WeightedReward.of(nearly_equal), max_resampling=1), BytePolicy(), 0, 0, 1)
    assert ids(sampled.discarded) == ["0", "1", "2", "3"]
    assert all(group.is_flat for group in sampled.groups)


def test_every_resampling_round_has_its_own_seeds():
    sampled = sample(collector({1, 4, 5}, max_resampling=2), BytePolicy(), 3, 0, 1)
    groups = [group for group in (*sampled.discarded, *sampled.groups) if group.number == 1]
    assert [group.completions[0].text for group in groups] == ["7/3/1/0", "7/3/1/1/0", "7/3/1/2/0"]


def test_collector_resumes_from_num_drawn():
    one, other = (collector({1, 5, 6, 9}, max_resampling=2) for _ in range(2))
    sample(one, BytePolicy(), 0, 0, 1)
    other.num_drawn = one.num_drawn
    assert sample(one, BytePolicy(), 1, 0, 1)[:2] == sample(other, BytePolicy(), 1, 0, 1)[:2]


@pytest.mark.parametrize("flat", [(), (1, 3, 4, 6), (0, 2, 5), range(5), range(99)])
def test_two_ranks_sample_the_same_as_one_rank(flat):
    """Also if all flat groups are on one rank, so that the other samples nothing in a round."""
    options = {"max_resampling": 2, "num_experts": 1}
    box, barrier = {}, threading.Barrier(2)
    found = [[], []]
    drawn = [[], []]

    def work(rank):
        source = collector(set(flat), drawn=drawn[rank], **options)
        for number in range(2):
            found[rank].append(sample(source, OneOfTwo(rank, box, barrier), number, rank, 2))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    one_rank_drawn = []
    one_rank = collector(set(flat), drawn=one_rank_drawn, **options)
    for number in range(2):
        whole = sample(one_rank, BytePolicy(), number, 0, 1)
        parts = [found[rank][number] for rank in range(2)]
        assert sorted(parts[0].groups + parts[1].groups) == sorted(whole.groups)
        assert sorted(parts[0].discarded + parts[1].discarded) == sorted(whole.discarded)
    assert drawn == [one_rank_drawn, one_rank_drawn]


# Expert demonstrations


def test_expert_problems_come_first_with_graded_solutions():
    drawn = []
    source = collector(drawn=drawn, num_experts=2)
    for number in range(2):
        groups = sample(source, BytePolicy(), number, 0, 1).groups
        expected = [f"expert-{2 * number}", f"expert-{2 * number + 1}", str(2 * number), str(2 * number + 1)]
        assert ids(groups) == expected
        assert [group.expert is None for group in groups] == [False, False, True, True]
        for i, group in enumerate(groups[:2]):
            solution = 2 * number + i
            assert group.expert.text == f"solution {solution}"
            assert group.expert.token_ids == list(f"solution {solution}".encode())
            assert group.expert.reward == solution % 2
            assert not group.expert.is_truncated
            assert len(group.completions) == 2
    assert drawn == [0, 1, 2, 3]  # only problems without an expert are drawn


def test_flat_group_with_expert_is_not_replaced():
    """It has a gradient, because the expert's reward is compared with the group's."""
    sampled = sample(collector(num_experts=2, expert_gold=FLAT, max_resampling=3), BytePolicy(), 0, 0, 1)
    assert sampled.groups[0].is_flat
    assert sampled.discarded == []


def test_all_problems_can_have_experts():
    drawn = []
    groups = sample(collector(drawn=drawn, num_experts=4), BytePolicy(), 0, 0, 1).groups
    assert drawn == []
    assert all(group.expert is not None for group in groups)


# Time


def test_sampling_and_grading_times_are_summed_over_rounds(monkeypatch):
    """Each round takes 10 s to sample and 1 s to grade; grading expert solutions takes 1 s."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("egspo_lightning.rollout.collector.time", clock)
    monkeypatch.setattr("egspo_lightning.rollout.grade_rollouts.time", clock)

    class Slow(Echo):
        def stream(self, *args, **kwargs):
            now[0] += 10
            yield [pair for batch in super().stream(*args, **kwargs) for pair in batch]

    def slow(completions, golds):
        now[0] += 1
        return reward_by_gold(completions, golds)

    source = collector({1}, engine=Slow(), reward=WeightedReward.of(slow), num_experts=1, max_resampling=1)
    sampled = sample(source, BytePolicy(), 0, 0, 1)
    assert len(sampled.discarded) == 1
    assert (sampled.seconds, sampled.seconds_grading) == (23.0, 3.0)


# Length penalty


def test_groups_with_different_length_penalties_are_not_flat():
    """A group is flat if its total rewards are equal."""

    class Growing(Echo):
        def stream(self, lm, requests, sampling, **kwargs):
            yield [(i, Sample([48] * (5 + i), False, [0.0] * (5 + i))) for i, _ in enumerate(requests)]

    options = {"engine": Growing(), "max_completion_length": 12, "max_resampling": 1}
    flat = set(range(4))
    assert len(sample(collector(flat, **options), BytePolicy(), 0, 0, 1).discarded) == 4
    reward = WeightedReward({"correctness": reward_by_gold, "length": SoftLengthPenalty(4)})
    sampled = sample(collector(flat, reward=reward, **options), BytePolicy(), 0, 0, 1)
    # 5 to 12 tokens, two per group; no penalty up to 8 tokens
    assert [completion.reward for group in sampled.groups[2:] for completion in group.completions] == pytest.approx(
        [0.75, 0.5, 0.25, 0.0]
    )
    assert [group.number for group in sampled.discarded] == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_resampling": 2, "num_generations": 1}, r"data\.max_resampling = 2 .* data\.num_generations = 1"),
        ({"reward": WeightedReward.of(SoftLengthPenalty(41))}, r"SoftLengthPenalty\.buffer = 41 .* = 40"),
    ],
)
def test_contradictory_sizes_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        collector(**options)


def test_flat_groups_are_summed_over_ranks_even_without_any():
    """A rank without flat groups still joins the sum."""
    calls = []

    class Counting(BytePolicy):
        def sum_over_ranks(self, values):
            calls.append(values.tolist())
            return torch.zeros_like(values)

    sample(collector(max_resampling=2), Counting(), 0, 0, 1)
    assert calls == [[0.0] * 4]
