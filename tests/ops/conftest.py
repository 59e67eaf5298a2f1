"""Random collections in float64 with prompts in front, and ranks that are threads."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from egspo_lightning.admission import Admission
from egspo_lightning.ops.attenuation import ConfidenceAttenuation
from egspo_lightning.ops.estimators import GroupRelative
from egspo_lightning.ops.gate import QuantileGate
from egspo_lightning.ops.objective import Objective
from egspo_lightning.ops.padding import row_lengths
from egspo_lightning.types import Current, RolloutBatch, ScoredRollouts, Scores, UpdateSize

WIDTH = 8
MAX_LENGTH = 7.0


class OneRank:
    """A process alone."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def gather_over_ranks(self, values: Tensor) -> Tensor:
        return values


class ThreadRank:
    """One of several ranks that run in threads and meet at each collective."""

    def __init__(self, number: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.number, self.board, self.barrier = number, board, barrier

    def _exchange(self, values: Tensor) -> list[Tensor]:
        self.barrier.wait()
        self.board[self.number] = values
        self.barrier.wait()
        return list(self.board)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return torch.stack(self._exchange(values)).sum(0)

    def gather_over_ranks(self, values: Tensor) -> Tensor:
        return torch.cat(self._exchange(values))


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., list[Any]]:
    """Calls ``work(rank, part)`` for each part, one rank each, at the same time; the results in order."""

    def run(work: Callable[[Any, Any], Any], parts: Sequence[Any]) -> list[Any]:
        if len(parts) == 1:
            return [work(OneRank(), parts[0])]
        board, barrier = [None] * len(parts), threading.Barrier(len(parts), timeout=20)
        results: list[Any] = [None] * len(parts)

        def one(number: int) -> None:
            try:
                results[number] = work(ThreadRank(number, board, barrier), parts[number])
            except BaseException as error:
                results[number] = error
                barrier.abort()

        threads = [threading.Thread(target=one, args=(number,)) for number in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    return run


@pytest.fixture(scope="session")
def make_scored() -> Callable[..., ScoredRollouts]:
    """Scored collections: P problems of G completions with prompts of 0 to 2 tokens, then rows of experts."""

    def build(
        *,
        seed: int = 0,
        num_problems: int = 2,
        group_size: int = 4,
        expert_groups: Sequence[int] = (),
        with_reference: bool = False,
        with_values: bool = False,
        rewards: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> ScoredRollouts:
        generator = torch.Generator().manual_seed(seed)
        rows = num_problems * group_size + len(expert_groups)

        def randn() -> Tensor:
            return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)

        start = torch.randint(0, 3, (rows, 1), generator=generator)
        length = torch.randint(1, WIDTH - 1, (rows, 1), generator=generator)
        positions = torch.arange(WIDTH)
        mask = (positions >= start) & (positions < start + length)
        old = -randn().abs() - 0.05
        given = torch.rand(rows, generator=generator) if rewards is None else torch.tensor(rewards)
        return ScoredRollouts(
            input_ids=torch.zeros(rows, WIDTH, dtype=torch.long),
            completion_mask=mask,
            scores=Scores(
                logprobs=old * mask,
                entropies=randn().abs() * mask,
                ref_logprobs=(old + 0.1 * randn()) * mask if with_reference else None,
                values=0.3 * randn() * mask if with_values else None,
            ),
            rewards=given.to(dtype),
            is_truncated=torch.zeros(rows, dtype=torch.bool),
            group_size=group_size,
            expert_groups=torch.tensor(expert_groups, dtype=torch.long),
            max_length=int(MAX_LENGTH),
            policy_version=3,
        )

    return build


@pytest.fixture(scope="session")
def split_scored() -> Callable[[ScoredRollouts, int], list[ScoredRollouts]]:
    """A collection as two ranks hold it: the first ``at`` problems, and the others."""

    def split(whole: ScoredRollouts, at: int) -> list[ScoredRollouts]:
        group_of = torch.arange(whole.num_sampled) // whole.group_size
        groups = torch.cat([group_of, whole.expert_groups])
        parts = []
        for is_mine, offset in ((groups < at, 0), (groups >= at, at)):
            rows = is_mine.nonzero().flatten()
            mine = whole.expert_groups[(whole.expert_groups < at) == (offset == 0)]
            scores = Scores(*(None if values is None else values[rows] for values in whole.scores))
            parts.append(
                whole._replace(
                    input_ids=whole.input_ids[rows],
                    completion_mask=whole.completion_mask[rows],
                    scores=scores,
                    rewards=whole.rewards[rows],
                    is_truncated=whole.is_truncated[rows],
                    expert_groups=mine - offset,
                    sampled_logprobs=None if whole.sampled_logprobs is None else whole.sampled_logprobs[rows],
                )
            )
        return parts

    return split


@pytest.fixture(scope="session")
def make_admission() -> Callable[..., Admission]:
    """An Admission as the defaults have it, with some parts replaced."""

    def build(**parts: Any) -> Admission:
        defaults = {
            "objective": Objective(),
            "gate": QuantileGate(0.3),
            "attenuation": ConfidenceAttenuation(),
            "advantage": GroupRelative(),
            "kl_reward": None,
            "entropy_bonus": None,
        }
        return Admission(**(defaults | parts))

    return build


@pytest.fixture(scope="session")
def sized() -> Callable[[RolloutBatch], RolloutBatch]:
    """Stamps a collection with its size, as if it were one update, counted by loops."""

    def stamp(rollout: RolloutBatch) -> RolloutBatch:
        lengths = [sum(row) for row in rollout.completion_mask.tolist()]
        sampled = sum(n for n, expert in zip(lengths, rollout.is_expert.tolist(), strict=True) if not expert)
        tokens, sequences = float(sum(lengths)), float(sum(n > 0 for n in lengths))
        return rollout._replace(update_size=UpdateSize(tokens, sequences, MAX_LENGTH, tokens, float(sampled)))

    return stamp


@pytest.fixture(scope="session")
def make_rollout(
    make_scored: Callable[..., ScoredRollouts],
    make_admission: Callable[..., Admission],
    sized: Callable[[RolloutBatch], RolloutBatch],
) -> Callable[..., tuple[RolloutBatch, Current]]:
    """An update's rollouts, admitted by one rank, and what networks that have moved since say of them (leaves).

    ``parts`` are those of the Admission; the rest goes to ``make_scored``.
    """

    def build(parts: dict[str, Any] | None = None, **scored: Any) -> tuple[RolloutBatch, Current]:
        rollouts = make_scored(**scored)
        rollout = sized(make_admission(**(parts or {})).admit(rollouts, OneRank())[0])
        generator = torch.Generator().manual_seed(1000 + scored.get("seed", 0))
        mask = rollout.completion_mask

        def randn() -> Tensor:
            return torch.randn(mask.shape, generator=generator, dtype=torch.float64).to(rollout.old_logprobs.dtype)

        old_values = rollouts.scores.values
        current = Current(
            logprobs=((rollout.old_logprobs + 0.3 * randn()) * mask).requires_grad_(),
            entropies=((rollout.entropies + 0.3 * randn()).abs() * mask).requires_grad_(),
            values=None if old_values is None else ((old_values + 0.3 * randn()) * mask).requires_grad_(),
        )
        return rollout, current

    return build


@pytest.fixture(scope="session")
def take() -> Callable[[RolloutBatch, Current, slice], tuple[RolloutBatch, Current]]:
    """Some rows as a micro-batch of the same update, cut to the longest of them."""

    def cut(rollout: RolloutBatch, current: Current, rows: slice) -> tuple[RolloutBatch, Current]:
        mask = rollout.completion_mask[rows]
        width = max(int(row_lengths(mask).max()), 1) if mask.shape[0] else 1

        def part(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value[rows, :width] if value.ndim == 2 and value.shape[1] == WIDTH else value[rows]

        fields = {name: part(value) for name, value in rollout._asdict().items() if name != "update_size"}
        return rollout._replace(**fields), Current(*(part(value) for value in current))

    return cut
