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
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.objective import Objective

NAMES = {
    "entropy_collapse",
    "kl_runaway",
    "ratio_after_sampling",
    "truncated",
    "zero_reward",
    "flat_rewards",
    "unmoved_weights",
    "tied_entropies",
}
EGSPO = {"initial_stage": "egspo"}


@dataclass(frozen=True)
class Constant:
    """The same reward for every completion."""

    value: float

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[float]:
        return [self.value] * len(completions)


class Sharpen(Callback):
    """Scales the output layer up at the second epoch, which makes the policy almost deterministic."""

    def __init__(self, factor=300):
        self.factor = factor

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            with torch.no_grad():
                module.policy.lm.get_output_embeddings().weight.mul_(self.factor)


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


def test_tied_entropies_guard_warns_once(guarded):
    metrics, warned = guarded(Sharpen(1e6), guards=Guards(**ALLOW_TRUNCATION, max_kl=1e9), module=LOW_LR)
    assert metrics["tied_entropies"] == [0, 1, 1]  # nearly all entropies round to 0
    assert warned.count("tied_entropies") == 1


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


def test_truncated_guard_does_not_suggest_masking_where_it_is_on(tiny_run):
    module = EGSPO | LOW_LR | {"objective": Objective(mask_truncated=True)}
    with pytest.warns(UserWarning, match=r"Guard truncated: .* Raise data\.max_completion_length to train") as caught:
        tiny_run(Guards(), module=module, trainer={"max_epochs": 1}).fit()
    assert not any("set model.objective.mask_truncated" in str(warning.message) for warning in caught)


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


HALF_PRECISION_STAGES = {"bfloat16": 1, "float16": 1, "float32": 0}


@pytest.fixture
def trained(tiny_run, small_model):
    """Trains weights of a type at a learning rate, with guards or without; returns the run and the warnings."""

    def run(dtype: str, rate: float, *callbacks, stage="egspo", schedule=None):
        module = {
            "policy": PolicyConfig(small_model, from_scratch=True, dtype=dtype),
            "optimizer": lambda params: torch.optim.AdamW(params, lr=rate, eps=1e-6, weight_decay=0.0),
            "lr_scheduler": schedule,
            "initial_stage": stage,
        }
        tiny = tiny_run(*callbacks, module=module, logger=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny.fit()
        return tiny, [str(w.message) for w in caught if "Guard unmoved_weights" in str(w.message)]

    return run


@pytest.mark.parametrize("dtype", HALF_PRECISION_STAGES)
@pytest.mark.parametrize("stage", ["sft", "egspo"])
def test_unmoved_weights_guard_warns_once_of_rounded_steps(trained, events, dtype, stage):
    run, warned = trained(dtype, 1e-6, StageTransition(after_epochs=1), Guards(), stage=stage)
    expected = HALF_PRECISION_STAGES[dtype]
    assert len(warned) == expected
    assert all(f"{dtype} rounds the rest off (guards.min_moved_fraction = 0.5)" in message for message in warned)
    assert all("model.policy.dtype: float32 and trainer.precision: bf16-mixed" in message for message in warned)
    assert {event.value for event in events(run.trainer).Scalars("guard/unmoved_weights")} == {expected}


def test_unmoved_weights_guard_measures_all_weights_in_a_small_model(trained):
    """The share is that of a comparison of all weights, where the sample holds them all."""
    start, guards = {}, Guards()

    class First(Callback):
        def on_train_epoch_start(self, trainer, module):
            if not start:
                start.update({name: p.detach().clone() for name, p in module.policy.named_parameters()})

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.is_last_batch and "share" not in start:
                moved = [(p != start[name])[p.grad != 0] for name, p in module.policy.named_parameters()]
                start["share"] = torch.cat(moved).double().mean().item()

    trained("bfloat16", 1e-6, First(), guards)
    assert guards.moved_fractions == {"egspo": pytest.approx(start["share"], abs=1e-12)}
    assert 0 < start["share"] < 0.03


def test_unmoved_weights_guard_accepts_a_large_rate_and_waits_for_the_end_of_a_warmup(trained, events):
    assert trained("bfloat16", 1e-2, Guards())[1] == []

    def warmup(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-5 if step < 2 else 1.0)

    guards = Guards()
    assert trained("bfloat16", 1e-2, guards, schedule=warmup)[1] == []
    assert guards.moved_fractions["egspo"] > 0.5


def test_unmoved_weights_guard_changes_no_weight(trained):
    with_guards, without = (trained("bfloat16", 1e-4, *callbacks)[0] for callbacks in ([Guards()], []))
    pairs = zip(with_guards.module.policy.parameters(), without.module.policy.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_guards_ignore_sft_epochs(tiny_run, events):
    tiny = tiny_run(StageTransition(after_epochs=2), Guards(), trainer={"max_epochs": 3}, logger=True).fit()
    assert len(events(tiny.trainer).Scalars("guard/truncated")) == 1


def test_resumed_guards_do_not_repeat_warnings():
    guards, resumed = Guards(), Guards()
    guards.spoken, guards.num_zero, guards.first_entropy = ["truncated"], 3, 0.7
    resumed.load_state_dict(guards.state_dict())
    assert (resumed.spoken, resumed.num_zero, resumed.first_entropy) == (["truncated"], 3, 0.7)
