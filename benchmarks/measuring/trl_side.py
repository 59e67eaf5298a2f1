"""TRL's GRPOTrainer on a workload: same weights, prompts, sizes, reward, optimizer and threads."""

import itertools
from collections.abc import Callable
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from egspo_lightning.data.generated_sources import GeneratedProblems
from egspo_lightning.rewards.functions import CorrectnessReward, Reward
from measuring.rewards import EvenCharacters
from measuring.timing import Reading, Stopwatch
from measuring.workloads import Workload

DIFFERENCES = (
    "TRL loads, pads and logs in its own way; its completions are other draws from the same policy.",
    "TRL's minibatches are drawn from the whole collection, ours take an even share of each group.",
    "TRL runs a collection's forward and backward passes on all rows; ours leaves out groups without spread, whose "
    "gradient is 0.",
    "TRL's optimizer is its default, the fused AdamW of torch; ours is AdamW as the quickstart sets it.",
)


class CycleEnds(TrainerCallback):
    """Tells of the end of every collection's last update; a true answer ends the run."""

    def __init__(self, updates_per_cycle: int, ended: Callable[[Any], bool]) -> None:
        self.updates_per_cycle, self.ended = updates_per_cycle, ended

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update ends."""
        if state.global_step % self.updates_per_cycle == 0 and self.ended(kwargs["model"]):
            control.should_training_stop = True


def run(workload: Workload, cycles: int, ended: Callable[[Any], bool]) -> None:
    """Train for so many collections, or until ``ended``, which is given the model after each, says so."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(workload.folder)
    model = AutoModelForCausalLM.from_pretrained(workload.folder)
    updates = workload.num_ppo_epochs * workload.num_minibatches
    source = GeneratedProblems()
    source.prepare(workload.seed, frozenset())
    problems = source.draw(0, workload.num_problems * cycles)
    rows = [{"prompt": problem.problem, "answer": problem.answer} for problem in problems]
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=_reward_function(workload),
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(**_settings(workload, cycles * updates)),
        callbacks=[CycleEnds(updates, ended)],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("ProgressCallback", "PrinterCallback"):
            trainer.remove_callback(type(callback))
    trainer.train()


def _settings(workload: Workload, max_steps: int) -> dict[str, Any]:
    """GRPO with TRL's own fast paths; everything that writes or talks is off."""
    return {
        "output_dir": str(workload.folder.parent / "trl"),
        "per_device_train_batch_size": workload.num_rollouts // workload.num_minibatches,
        "steps_per_generation": workload.num_minibatches,
        "num_iterations": workload.num_ppo_epochs,
        "num_generations": workload.num_generations,
        "max_completion_length": workload.max_completion_length,
        "max_steps": max_steps,
        "temperature": 1.0,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "epsilon": 0.2,
        "loss_type": "dapo",  # token-mean over the update, as ours
        "seed": workload.seed,
        "shuffle_dataset": False,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _reward_function(workload: Workload) -> Callable[..., list[float]]:
    reward: Reward = EvenCharacters() if "Even" in workload.reward else CorrectnessReward()

    def score(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return reward(completions, answer)

    return score


def iteration_times(workload: Workload, iterations: int, warmup: int) -> list[Reading]:
    """Time from the end of one collection's updates to the end of the next's."""
    readings: list[Reading] = []
    watches: list[Stopwatch] = []
    count = itertools.count(1)

    def ended(_: Any) -> bool:
        if watches:
            watches[-1].stop()
            readings.append(watches[-1].total)
        if next(count) >= warmup:
            watches.append(Stopwatch())
            watches[-1].start()
        return False

    run(workload, warmup + iterations, ended)
    return readings
