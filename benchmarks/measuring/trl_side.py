"""TRL's GRPOTrainer on a workload, with the same weights, prompts, sizes, reward and learning rate as ours."""

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
    "TRL has its own loading, padding and logging, and samples other completions from the same policy.",
    "TRL draws minibatches from the whole rollout batch; ours take an equal share of each group.",
    "TRL computes the passes of all rows; ours skip groups without reward spread, whose gradient is 0.",
    "TRL uses its default optimizer, torch's fused AdamW; ours is AdamW as in the quickstart.",
)


class IterationEnd(TrainerCallback):
    """Calls ``is_finished`` with the model after each iteration, and ends the run if it returns True."""

    def __init__(self, steps_per_iteration: int, is_finished: Callable[[Any], bool]) -> None:
        self.steps_per_iteration, self.is_finished = steps_per_iteration, is_finished

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check for the last optimizer step of an iteration."""
        if state.global_step % self.steps_per_iteration == 0 and self.is_finished(kwargs["model"]):
            control.should_training_stop = True


def run(workload: Workload, iterations: int, is_finished: Callable[[Any], bool]) -> None:
    """Train for at most ``iterations`` rollout batches; ``is_finished`` gets the model after each of them."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(workload.folder)
    model = AutoModelForCausalLM.from_pretrained(workload.folder)
    steps = workload.num_ppo_epochs * workload.num_minibatches
    source = GeneratedProblems()
    source.prepare(workload.seed, frozenset())
    problems = source.draw(0, workload.num_problems * iterations)
    rows = [{"prompt": problem.problem, "answer": problem.answer} for problem in problems]
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=_reward_function(workload),
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(**_settings(workload, iterations * steps)),
        callbacks=[IterationEnd(steps, is_finished)],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("ProgressCallback", "PrinterCallback"):
            trainer.remove_callback(type(callback))
    trainer.train()


def _settings(workload: Workload, max_steps: int) -> dict[str, Any]:
    """GRPO with TRL's fast paths, without logging and checkpoints."""
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
        "loss_type": "dapo",  # token mean over the optimizer step, as in ours
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
    """Time each iteration from the end of the one before, as ``IterationTimes`` does."""
    readings: list[Reading] = []
    watches: list[Stopwatch] = []
    count = itertools.count(1)

    def record(_: Any) -> bool:
        if watches:
            watches[-1].stop()
            readings.append(watches[-1].total)
        if next(count) >= warmup:
            watches.append(Stopwatch())
            watches[-1].start()
        return False

    run(workload, warmup + iterations, record)
    return readings
