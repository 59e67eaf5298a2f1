"""Runs of several methods one after another, in one process or under torchrun.

    python ranks_program.py FOLDER STRATEGY METHOD ...

The metrics of each run go to FOLDER/METHOD. One program for all runs saves starts of torchrun and imports.
"""

import sys
from collections.abc import Sequence

from egspo_lightning.cli.main import run
from egspo_lightning.cli.process_exit import leave

SHORT = [
    "--config=configs/quickstart.yaml",
    "--trainer.max_epochs=4",
    "--trainer.logger=CSVLogger",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false",
    "--data.demonstrations.init_args.num_demonstrations=32",
    "--data.sft_batch_size=16",
    "--data.benchmarks=null",
    "--data.num_problems=4",
    "--data.num_generations=4",
    "--data.max_completion_length=40",
    "--data.engine.max_batch_size=6",  # grading overlaps with sampling
    "--data.reward=ranks_program.EvenBytes",
    "--stage_transition.after_epochs=1",
    "--stage_transition.learning_rate=1e-3",
    "--hf_export.enabled=false",
    "--token_records.every_n_rollout_batches=0",
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
    for method in methods:
        root = f"{folder}/{method}"
        folders = [f"--trainer.default_root_dir={root}", f"--trainer.logger.save_dir={root}"]
        run(["fit", *SHORT, *METHODS[method], *STRATEGIES[strategy], *folders])
    leave(0)
