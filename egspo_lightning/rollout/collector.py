"""Rollout collector: draws the problems of a rollout batch, and samples and grades a group of completions for each.

A group's completions depend on the seed, the number of the rollout batch and the problem's place in it. So a rollout
batch holds the same completions on one rank or many.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from egspo_lightning.errors import UserError
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rollout.engine import RolloutEngine, Sample
from egspo_lightning.rollout.grade_rollouts import grade_rollouts, sample_and_grade
from egspo_lightning.rollout.policy_protocol import RolloutPolicy
from egspo_lightning.rollout.rollout_records import DrawnProblems, Group, Prompt, SampledGroups
from egspo_lightning.types import ExpertSolution, Problem, Sampling


@dataclass
class Collector:
    """Draws problems, samples and grades completions; call its methods in the order in which they are defined.

    Args:
        engine: Samples completions.
        reward: Grades completions and gives their rewards.
        draw: Gives problems number ``start`` to ``start + count - 1`` of an endless order.
        draw_experts: Gives demonstrations in the same way.
        encode: Gives the token ids of a problem's prompt.
        num_problems: Problems of a rollout batch, over all ranks.
        num_experts: Those of them that come from the demonstrations, with the expert's solution.
        num_generations: Completions of each problem.
        max_completion_length: In tokens, EOS included.
        max_resampling: Most rounds that replace flat groups by groups of other problems.
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
        if self.max_resampling > 0 and self.num_generations < 2:
            raise UserError(
                f"data.max_resampling = {self.max_resampling} replaces flat groups, whose rewards are all equal, "
                "and with data.num_generations = 1 every group is flat. "
                "Set max_resampling to 0, or num_generations to 2 or more."
            )
        if self.max_resampling > 0 and self.num_experts == self.num_problems:
            raise UserError(
                f"data.max_resampling = {self.max_resampling} replaces groups without an expert, and with "
                "data.expert_fraction every group has one. Set max_resampling to 0, or lower expert_fraction."
            )
        self.reward.require_fit(self.max_completion_length)

    def draw_problems(self, number: int, rank: int, world_size: int) -> DrawnProblems:
        """Draw the problems of rollout batch ``number``; a rank takes every ``world_size``-th of them."""
        experts = self.draw_experts(number * self.num_experts, self.num_experts)
        problems = [*(expert.problem for expert in experts), *self._draw(self.num_problems - self.num_experts)]
        places = range(rank, self.num_problems, world_size)
        prompts = {place: self._prompt(problems[place], f"{number}/{place}") for place in places}
        return DrawnProblems(number, prompts, {place: experts[place] for place in places if place < self.num_experts})

    def sample_and_grade(self, policy: RolloutPolicy, prompts: Mapping[int, Prompt]) -> SampledGroups:
        """Sample a group of completions for each prompt, given by place, and grade them. Collective."""
        started = time.perf_counter()
        sampling, size = Sampling(self.max_completion_length, policy.temperature), self.num_generations
        graded, waited = sample_and_grade(policy, self.engine, self.reward, list(prompts.values()), size, sampling)
        groups = [
            Group(place, prompt, graded[i * size : (i + 1) * size], None)
            for i, (place, prompt) in enumerate(prompts.items())
        ]
        return SampledGroups(groups, [], time.perf_counter() - started, waited)

    def replace_flat_groups(self, policy: RolloutPolicy, drawn: DrawnProblems, sampled: SampledGroups) -> SampledGroups:
        """Replace flat groups without an expert by groups of other problems, round after round. Collective."""
        for attempt in range(1, self.max_resampling + 1):
            flat = self._flat_places(policy, sampled.groups)
            if not flat:
                break
            problems = zip(flat, self._draw(len(flat)), strict=True)
            prompts = {
                place: self._prompt(problem, f"{drawn.number}/{place}/{attempt}")
                for place, problem in problems
                if place in drawn.prompts
            }
            sampled = sampled.replace(self.sample_and_grade(policy, prompts))
        return sampled

    def grade_expert_solutions(
        self, policy: RolloutPolicy, drawn: DrawnProblems, sampled: SampledGroups
    ) -> SampledGroups:
        """Grade the expert solutions like completions, and add them to their groups."""
        started = time.perf_counter()
        samples = [Sample(s.token_ids, False, [0.0] * len(s.token_ids)) for s in drawn.solutions.values()]
        prompts = [drawn.prompts[place] for place in drawn.solutions]
        graded = grade_rollouts(policy, self.reward, prompts, samples, self.max_completion_length)
        experts = dict(zip(drawn.solutions, graded, strict=True))
        seconds = time.perf_counter() - started
        return sampled._replace(
            groups=[group._replace(expert=experts.get(group.number)) for group in sampled.groups],
            seconds=sampled.seconds + seconds,
            seconds_grading=sampled.seconds_grading + seconds,
            has_experts=self.num_experts > 0,
        )

    def _draw(self, count: int) -> Sequence[Problem]:
        self.num_drawn += count
        return self.draw(self.num_drawn - count, count)

    def _prompt(self, problem: Problem, stream: str) -> Prompt:
        return Prompt(problem, self.encode(problem), f"{self.seed}/{stream}")

    def _flat_places(self, policy: RolloutPolicy, groups: list[Group]) -> list[int]:
        """Places of flat groups without an expert, on all ranks."""
        flags = torch.zeros(self.num_problems)
        for group in groups:
            flags[group.number] = float(group.is_flat and group.number >= self.num_experts)
        places: list[int] = policy.sum_over_ranks(flags).nonzero().flatten().tolist()
        return places
