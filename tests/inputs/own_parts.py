"""Parts as a user writes them, each with a bug: a line of this file raises an exception."""

from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import AdamW

from egspo_lightning import (
    ArithmeticTask,
    Benchmark,
    DemonstrationSource,
    Entropies,
    Estimate,
    Experience,
    FiniteProblems,
    Problem,
    Request,
    Sample,
    Sampling,
)


def fail() -> Any:
    return {}["bug in own_parts"]


def reward(completions: Sequence[str], golds: Sequence[str]) -> list[float]:
    return [fail() for _ in completions]


class FailsWhenBuilt(AdamW):
    def __init__(self, params: Any) -> None:
        fail()


class Gate:
    def threshold(self, entropies: Entropies) -> Tensor:
        return fail()


class BuiltGate(Gate):
    def __init__(self) -> None:
        fail()


class Advantage:
    min_generations, needs_values = 1, False

    def estimate(self, experience: Experience) -> Estimate:
        return fail()


class Engine:
    def stream(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> Iterator[list[tuple[int, Sample]]]:
        yield fail()


class Demonstrations(DemonstrationSource):
    def load(self) -> Any:
        return fail()


class Problems(FiniteProblems):
    def load(self) -> list[Problem]:
        return fail()


class Sums(Benchmark):
    def read(self) -> list[Problem]:
        return fail()


class Task(ArithmeticTask):
    def solve(self, problem: Problem, seed: int | str = 0) -> Any:
        return fail()


class Watch(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        fail()
