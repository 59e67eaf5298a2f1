"""Every guard warns once in a run with its problem, and no guard warns in a healthy run."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback

from egspo_lightning import Guards, StageTransition
from egspo_lightning.data.dataset_sources import DatasetProblems
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.evaluation.benchmarks import GeneratedBenchmark

NAMES = {"entropy_collapse", "kl_runaway", "ratio_after_sampling", "truncated", "zero_reward", "flat_rewards"}
EGSPO = {"initial_stage": "egspo"}


@dataclass(frozen=True)
class Constant:
    """The same reward for every completion."""

    value: float

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[float]:
        return [self.value] * len(completions)


class Sharpen(Callback):
    """Scales the output layer up at the second epoch, which makes the policy almost deterministic."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            with torch.no_grad():
                module.policy.lm.get_output_embeddings().weight.mul_(300)


@pytest.fixture
def guarded(tiny_run, events):
    """Trains with guards; returns the values of every guard metric, and the name of the guard of each warning."""

    def run(*callbacks, guards=None, module=None, data=None, trainer=None):
        tiny = tiny_run(
            *callbacks,
            guards or Guards(),
            module=EGSPO | (module or {}),
            data=data,
            trainer={"max_epochs": 3} | (trainer or {}),
            logger=True,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny.fit()
        accumulator = events(tiny.trainer)
        tags = [tag for tag in accumulator.Tags()["scalars"] if tag.startswith("guard/")]
        warned = [str(w.message).split(":")[0].removeprefix("Guard ") for w in caught if "Guard " in str(w.message)]
        metrics = {tag.removeprefix("guard/"): [e.value for e in accumulator.Scalars(tag)] for tag in tags}
        return metrics, warned

    return run


LOW_LR = {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-4)}
ALLOW_TRUNCATION = {"max_truncated_fraction": 1.0}
"""A policy with random weights rarely samples EOS."""


def test_no_guard_warns_in_a_healthy_run(guarded):
    metrics, warned = guarded(guards=Guards(**ALLOW_TRUNCATION), module=LOW_LR)
    assert warned == []
    assert set(metrics) == NAMES | {"flat_rollout_batches", "duplicate_problems"}
    assert all(values == [0, 0, 0] for values in metrics.values())


def test_entropy_collapse_guard_warns_once(guarded):
    metrics, warned = guarded(Sharpen(), guards=Guards(**ALLOW_TRUNCATION, max_kl=1e9), module=LOW_LR)
    assert metrics["entropy_collapse"] == [0, 1, 1]
    assert warned.count("entropy_collapse") == 1


def test_kl_runaway_guard_warns_once(guarded):
    fast = {"optimizer": lambda params: torch.optim.AdamW(params, lr=0.3)}
    metrics, warned = guarded(module=fast, data={"num_ppo_epochs": 4})
    assert max(metrics["kl_runaway"]) == 1
    assert warned.count("kl_runaway") == 1


class Drift(Callback):
    """Changes the policy between sampling and the first optimizer step, as a sampler with stale weights does."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            with torch.no_grad():
                module.policy.lm.get_output_embeddings().weight.mul_(1.2)


def test_ratio_after_sampling_guard_warns_in_low_precision(guarded):
    """In float32 the same gap ends the run."""
    guards = Guards(max_first_ratio_gap=1e-3, **ALLOW_TRUNCATION)
    metrics, warned = guarded(
        Drift(), guards=guards, module=LOW_LR, trainer={"precision": "bf16-mixed", "max_epochs": 1}
    )
    assert metrics["ratio_after_sampling"] == [1]
    assert warned == ["ratio_after_sampling"]


def test_truncated_guard_warns_once(guarded):
    metrics, warned = guarded(module=LOW_LR)
    assert metrics["truncated"] == [1, 1, 1]
    assert warned.count("truncated") == 1


def test_zero_reward_guard_warns_after_n_rollout_batches(guarded):
    metrics, warned = guarded(guards=Guards(num_zero_rewards=2), module=LOW_LR, data={"reward": Constant(0.0)})
    assert metrics["zero_reward"] == [0, 1, 1]
    assert warned.count("zero_reward") == 1


def test_flat_rewards_guard_counts_flat_rollout_batches(guarded, tiny_run):
    metrics, warned = guarded(module=LOW_LR, data={"reward": Constant(0.5)})
    assert metrics["flat_rewards"] == [1, 1, 1]
    assert metrics["flat_rollout_batches"] == [1, 2, 3]
    assert metrics["zero_reward"] == [0, 0, 0]
    assert warned.count("flat_rewards") == 1


def test_duplicate_problems_guard_counts_benchmark_problems(guarded, tmp_path):
    """The benchmark's six problems are also training problems."""
    task = ArithmeticTask(num_digits=1)
    benchmark = GeneratedBenchmark(num_problems=6, task=task)
    benchmark_problems = [problem.problem for problem in benchmark.load()]
    others = ["10+10=?", "10+11=?"]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(f'{{"problem": "{text}", "answer": "1"}}\n' for text in [*benchmark_problems, *others]))
    metrics, warned = guarded(module=LOW_LR, data={"benchmarks": [benchmark], "problems": DatasetProblems(str(path))})
    assert metrics["duplicate_problems"] == [6, 6, 6]
    assert warned.count("duplicate_problems") == 1


def test_guards_ignore_sft_epochs(tiny_run, events):
    tiny = tiny_run(StageTransition(after_epochs=2), Guards(), trainer={"max_epochs": 3}, logger=True).fit()
    assert len(events(tiny.trainer).Scalars("guard/truncated")) == 1


def test_resumed_guards_do_not_repeat_warnings():
    guards, resumed = Guards(), Guards()
    guards.spoken, guards.num_zero, guards.first_entropy = ["truncated"], 3, 0.7
    resumed.load_state_dict(guards.state_dict())
    assert (resumed.spoken, resumed.num_zero, resumed.first_entropy) == (["truncated"], 3, 0.7)
