"""Collections of rollouts, one after another: which problems, how many rounds of sampling, which experts' solutions.

What a rank samples depends on the seed, the collection and the problem's place in it, so a collection holds the same
completions on one rank or many.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from egspo_lightning.errors import UserError, require
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rollout.engine import RolloutEngine, Sample
from egspo_lightning.rollout.generation import Prompt, complete, grade
from egspo_lightning.rollout.policy_protocol import RolloutPolicy
from egspo_lightning.types import Completion, ExpertSolution, Problem, Sampling


class Group(NamedTuple):
    """The completions of one problem."""

    number: int
    """The problem's place in the collection."""
    prompt: Prompt
    completions: list[Completion]
    expert: Completion | None

    @property
    def is_flat(self) -> bool:
        """Whether all rewards are equal, so that nothing can be learned from comparing them."""
        return len({completion.reward for completion in self.completions}) == 1


class SampledGroups(NamedTuple):
    """This rank's groups of a collection, and those that were sampled and put aside on the way."""

    groups: list[Group]
    discarded: list[Group]
    seconds: float
    """From the first prompt to the last grade."""
    seconds_grading: float
    """Those of them in which only grades were waited for."""
    has_experts: bool = False
    """Whether experts' solutions stand in the collection, on this rank or another."""


@dataclass
class Collector:
    """Samples and grades collections.

    Args:
        engine: Samples completions.
        reward: Scores them.
        draw: Gives problems number ``start`` to ``start + count - 1`` of an endless order.
        draw_experts: The same for demonstrations.
        encode: A problem's prompt as ids.
        num_problems: Problems a collection, over all ranks.
        num_experts: Those of them that come from the demonstrations, with the expert's solution.
        num_generations: Completions a problem.
        max_completion_length: In tokens, EOS included.
        max_resampling: Rounds at most in which groups without spread are replaced by other problems'.
        seed: Names the random streams.
    """

    engine: RolloutEngine
    reward: WeightedReward
    draw: Callable[[int, int], Sequence[Problem]]
    draw_experts: Callable[[int, int], Sequence[ExpertSolution]]
    encode: Callable[[Problem], list[int]]
    num_problems: int
    num_experts: int
    num_generations: int
    max_completion_length: int
    max_resampling: int
    seed: int

    num_drawn: int = field(default=0, init=False)
    """Problems drawn so far, over all ranks."""

    def __post_init__(self) -> None:
        for name in ("num_problems", "num_generations", "max_completion_length"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "at least 1")
        require(self.max_resampling >= 0, "data.max_resampling", self.max_resampling, "at least 0")
        if self.max_resampling > 0 and self.num_generations < 2:
            raise UserError(
                f"data.max_resampling = {self.max_resampling} replaces groups without spread, and with "
                "data.num_generations = 1 no group has any. Set max_resampling to 0, or num_generations to 2 or more."
            )
        if self.max_resampling > 0 and self.num_experts == self.num_problems:
            raise UserError(
                f"data.max_resampling = {self.max_resampling} replaces groups without an expert, and with "
                "data.expert_fraction every group has one. Set max_resampling to 0, or lower expert_fraction."
            )
        self.reward.require_fit(self.max_completion_length)

    def sample(self, policy: RolloutPolicy, number: int, rank: int, world_size: int) -> SampledGroups:
        """Sample rollout batch ``number``; a rank takes every ``world_size``-th of its problems. Collective."""
        started = time.perf_counter()
        places = range(rank, self.num_problems, world_size)
        experts = self.draw_experts(number * self.num_experts, self.num_experts)
        drawn = [*(e.problem for e in experts), *self._draw(self.num_problems - self.num_experts)]
        prompts = {place: self._prompt(drawn[place], f"{number}/{place}") for place in places}
        groups, waited = self._complete(policy, prompts)
        discarded: list[Group] = []
        for attempt in range(self.max_resampling):
            flat = self._flat_places(policy, groups)
            if not flat:
                break
            fresh = dict(zip(flat, self._draw(len(flat)), strict=True))
            prompts = {p: self._prompt(fresh[p], f"{number}/{p}/{attempt + 1}") for p in flat if p in groups}
            discarded += [groups[place] for place in prompts]
            replaced, more = self._complete(policy, prompts)
            groups, waited = groups | replaced, waited + more
        sampled = time.perf_counter()
        solved = {place: experts[place] for place in range(rank, self.num_experts, world_size)}
        groups |= self._with_experts(policy, groups, solved)
        ended = time.perf_counter()
        groups_in_order = [groups[place] for place in places]
        return SampledGroups(
            groups_in_order, discarded, ended - started, waited + ended - sampled, self.num_experts > 0
        )

    def _draw(self, count: int) -> Sequence[Problem]:
        self.num_drawn += count
        return self.draw(self.num_drawn - count, count)

    def _prompt(self, problem: Problem, stream: str) -> Prompt:
        return Prompt(problem, self.encode(problem), f"{self.seed}/{stream}")

    def _complete(self, policy: RolloutPolicy, prompts: dict[int, Prompt]) -> tuple[dict[int, Group], float]:
        """The groups by place, and the seconds in which grades were waited for."""
        sampling = Sampling(self.max_completion_length, policy.temperature)
        size = self.num_generations
        flat, waited = complete(policy, self.engine, self.reward, list(prompts.values()), size, sampling)
        groups = {
            place: Group(place, prompt, flat[i * size : (i + 1) * size], None)
            for i, (place, prompt) in enumerate(prompts.items())
        }
        return groups, waited

    def _flat_places(self, policy: RolloutPolicy, groups: dict[int, Group]) -> list[int]:
        """Places, on all ranks, whose group has no spread and no expert."""
        flags = torch.zeros(self.num_problems)
        for place, group in groups.items():
            flags[place] = float(group.is_flat and place >= self.num_experts)
        indices: list[int] = policy.sum_over_ranks(flags).nonzero().flatten().tolist()
        return indices

    def _with_experts(
        self, policy: RolloutPolicy, groups: dict[int, Group], solutions: dict[int, ExpertSolution]
    ) -> dict[int, Group]:
        """The groups at the solutions' places, with these graded as any other."""
        samples = [Sample(s.token_ids, False, [0.0] * len(s.token_ids)) for s in solutions.values()]
        prompts = [groups[place].prompt for place in solutions]
        experts = grade(policy, self.reward, prompts, samples, self.max_completion_length)
        return {p: groups[p]._replace(expert=expert) for p, expert in zip(solutions, experts, strict=True)}
