"""Observing callbacks do not change training: weights and random state are bit-identical with and without them."""

import pytest
import torch

from egspo_lightning import (
    Dashboard,
    EntropyHistogram,
    MathBenchmark,
    PhaseProgress,
    ProbabilityShift,
    RolloutSamples,
    StageTransition,
    TokenRecords,
)
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.evaluation.benchmarks import GeneratedBenchmark


def benchmarks() -> list[GeneratedBenchmark]:
    task = ArithmeticTask(num_digits=1)
    return [
        GeneratedBenchmark("greedy", num_problems=3, task=task),
        GeneratedBenchmark("sampled", num_problems=3, task=task, num_samples=2, temperature=1.0),
    ]


OBSERVERS = {
    "math_benchmark": lambda: [MathBenchmark(every_n_epochs=1)],
    "entropy_histogram": lambda: [EntropyHistogram()],
    "probability_shift": lambda: [ProbabilityShift()],
    "token_records": lambda: [TokenRecords(every_n_rollout_batches=1)],
    "rollout_samples": lambda: [RolloutSamples(1)],
    "dashboard": lambda: [Dashboard()],
    "progress": lambda: [PhaseProgress()],
    "all": lambda: [
        MathBenchmark(every_n_epochs=1),
        EntropyHistogram(),
        TokenRecords(every_n_rollout_batches=1),
        RolloutSamples(1),
        Dashboard(),
        PhaseProgress(),
    ],
}


def train(tiny_run, callbacks) -> list[torch.Tensor]:
    data = {"benchmarks": benchmarks(), "num_ppo_epochs": 2}
    trainer = {"max_epochs": 4, "enable_progress_bar": any(isinstance(c, PhaseProgress) for c in callbacks)}
    run = tiny_run(*callbacks, StageTransition(), data=data, trainer=trainer, logger=True).fit()
    torch_state = torch.get_rng_state()
    return [*(p.detach() for p in run.module.policy.parameters()), torch_state]


@pytest.fixture
def plain(tiny_run) -> list[torch.Tensor]:
    return train(tiny_run, [])


@pytest.mark.parametrize("name", OBSERVERS)
def test_training_with_observers_is_bit_identical(tiny_run, plain, name):
    observed = train(tiny_run, OBSERVERS[name]())
    assert all(map(torch.equal, observed, plain))


def test_comparison_detects_a_run_with_another_seed(tiny_run, plain):
    run = tiny_run(data={"benchmarks": benchmarks(), "num_ppo_epochs": 2, "seed": 2}, trainer={"max_epochs": 4})
    run.trainer.callbacks.append(StageTransition())
    run.fit()
    assert not all(map(torch.equal, run.module.policy.parameters(), plain))
