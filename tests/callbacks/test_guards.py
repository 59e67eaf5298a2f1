"""Each guard fires in a run that has what it looks for, once; in one that has not, none does."""

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
    """The same reward for everything."""

    value: float

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[float]:
        return [self.value] * len(completions)


class Sharpen(Callback):
    """Scales the output layer up from the second phase on: the policy becomes sure of itself."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            with torch.no_grad():
                module.policy.lm.get_output_embeddings().weight.mul_(300)


@pytest.fixture
def guarded(tiny_run, events):
    """Runs with guards; gives the last value of every guard's metric, and the warnings by guard."""

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
        said = [str(w.message).split(":")[0].removeprefix("Guard ") for w in caught if "Guard " in str(w.message)]
        metrics = {tag.removeprefix("guard/"): [e.value for e in accumulator.Scalars(tag)] for tag in tags}
        return metrics, said

    return run


GENTLE = {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-4)}
LOOSE = {"max_truncated_fraction": 1.0}
"""A policy of random weights seldom finds the end."""


def test_none_fires_in_a_run_that_is_well(guarded):
    metrics, said = guarded(guards=Guards(**LOOSE), module=GENTLE)
    assert said == []
    assert set(metrics) == NAMES | {"flat_rollout_batches", "duplicate_problems"}
    assert all(values == [0, 0, 0] for values in metrics.values())


def test_entropy_collapse(guarded):
    metrics, said = guarded(Sharpen(), guards=Guards(**LOOSE, max_kl=1e9), module=GENTLE)
    assert metrics["entropy_collapse"] == [0, 1, 1]
    assert said.count("entropy_collapse") == 1


def test_kl_runaway(guarded):
    fast = {"optimizer": lambda params: torch.optim.AdamW(params, lr=0.3)}
    metrics, said = guarded(module=fast, data={"num_ppo_epochs": 4})
    assert max(metrics["kl_runaway"]) == 1
    assert said.count("kl_runaway") == 1


class Drift(Callback):
    """Moves the policy between sampling and the first update, as a sampler with stale weights would."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            with torch.no_grad():
                module.policy.lm.get_output_embeddings().weight.mul_(1.2)


def test_ratio_after_sampling(guarded):
    """Where the precision leaves room for it; in float32 the run would end."""
    guards = Guards(max_first_ratio_gap=1e-3, **LOOSE)
    metrics, said = guarded(Drift(), guards=guards, module=GENTLE, trainer={"precision": "bf16-mixed", "max_epochs": 1})
    assert metrics["ratio_after_sampling"] == [1]
    assert said == ["ratio_after_sampling"]


def test_truncated(guarded):
    metrics, said = guarded(module=GENTLE)
    assert metrics["truncated"] == [1, 1, 1]
    assert said.count("truncated") == 1


def test_zero_reward_after_n_collections(guarded):
    metrics, said = guarded(guards=Guards(num_zero_rewards=2), module=GENTLE, data={"reward": Constant(0.0)})
    assert metrics["zero_reward"] == [0, 1, 1]
    assert said.count("zero_reward") == 1


def test_flat_rewards_are_counted_and_their_updates_skipped(guarded, tiny_run):
    metrics, said = guarded(module=GENTLE, data={"reward": Constant(0.5)})
    assert metrics["flat_rewards"] == [1, 1, 1]
    assert metrics["flat_rollout_batches"] == [1, 2, 3]
    assert metrics["zero_reward"] == [0, 0, 0]
    assert said.count("flat_rewards") == 1


def test_duplicate_problems_are_counted(guarded, tmp_path):
    """Six of the demonstrations' problems, once more as training problems beside others, are asked by a benchmark."""
    task = ArithmeticTask(num_digits=1)
    benchmark = GeneratedBenchmark(num_problems=6, task=task)
    asked = [problem.problem for problem in benchmark.load()]
    others = ["10+10=?", "10+11=?"]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(f'{{"problem": "{text}", "answer": "1"}}\n' for text in [*asked, *others]))
    metrics, said = guarded(module=GENTLE, data={"benchmarks": [benchmark], "problems": DatasetProblems(str(path))})
    assert metrics["duplicate_problems"] == [6, 6, 6]
    assert said.count("duplicate_problems") == 1


def test_a_phase_of_sft_is_not_judged(tiny_run, events):
    tiny = tiny_run(StageTransition(after_epochs=2), Guards(), trainer={"max_epochs": 3}, logger=True).fit()
    assert len(events(tiny.trainer).Scalars("guard/truncated")) == 1


def test_what_was_said_is_not_said_again_after_resuming():
    guards, again = Guards(), Guards()
    guards.spoken, guards.num_zero, guards.first_entropy = ["truncated"], 3, 0.7
    again.load_state_dict(guards.state_dict())
    assert (again.spoken, again.num_zero, again.first_entropy) == (["truncated"], 3, 0.7)
