"""Runs of several methods one after another, in one process or under torchrun.

    python ranks_program.py FOLDER STRATEGY METHOD ...

The metrics of each run go to FOLDER/METHOD.
"""

import sys
from collections.abc import Sequence

from short_runs import SHORT, fit_all

RUN = [
    *SHORT,
    "--trainer.max_epochs=4",
    "--trainer.enable_checkpointing=false",
    "--data.engine.max_batch_size=6",  # grading overlaps with sampling
    "--data.reward=ranks_program.EvenBytes",
    "--stage_transition.after_epochs=1",
    "--stage_transition.learning_rate=1e-3",
]
METHODS = {
    "ppo": ["--config=configs/methods/ppo.yaml", "--model.critic.warmup_steps=1"],
    "ppo_critic": ["--config=configs/methods/ppo_critic.yaml", "--model.critic.warmup_steps=1"],
    "reinforce_plus_plus": ["--config=configs/methods/reinforce_plus_plus.yaml", "--model.kl_reward.target=0.01"],
    "dynamic_sampling": ["--config=configs/methods/grpo.yaml", "--data.max_resampling=2"],
    "luffy": ["--config=configs/methods/luffy.yaml", "--data.expert_fraction=0.25", "--data.max_resampling=1"],
    "sequence_gate": [
        "--model.gate.over=sequence",
        "--model.objective.rescale_weights=true",
        "--stage_transition.learning_rate=1e-4",  # at 1e-3 rounding decides whether some ratios are clipped
    ],
}
STRATEGIES = {
    "alone": [],
    "ddp": ["--trainer.strategy=ddp", "--trainer.devices=2"],
    "fsdp2": ["--trainer.strategy=fsdp2", "--trainer.devices=2"],
}


class EvenBytes:
    """Share of even bytes, which an untrained policy can learn from; constant for even answers."""

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[float]:
        return [
            0.5 if int(gold) % 2 == 0 else sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1)
            for text, gold in zip(completions, golds, strict=True)
        ]


if __name__ == "__main__":
    folder, strategy, *methods = sys.argv[1:]
    fit_all(folder, {method: [*RUN, *METHODS[method], *STRATEGIES[strategy]] for method in methods})
