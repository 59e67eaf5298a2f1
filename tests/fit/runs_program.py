"""Runs of the command line one after another, in one process or under torchrun.

    python runs_program.py FOLDER '{"NAME": [ARGUMENT, ...], ...}'

Each run writes to FOLDER/NAME. One program for all runs saves starts of torchrun and imports.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

from egspo_lightning.cli.main import run
from egspo_lightning.cli.process_exit import leave

SHORT = [
    "--config=configs/quickstart.yaml",
    "--trainer.max_epochs=4",
    "--trainer.logger=CSVLogger",
    "--trainer.enable_progress_bar=false",
    "--data.demonstrations.init_args.num_demonstrations=32",
    "--data.sft_batch_size=16",
    "--data.benchmarks=null",
    "--data.num_problems=4",
    "--data.num_generations=4",
    "--data.max_completion_length=40",
    "--data.reward=ranks_program.EvenBytes",
    "--stage_transition.after_epochs=1",
    "--stage_transition.learning_rate=1e-3",
    "--hf_export.enabled=false",
    "--token_records.every_n_rollout_batches=0",
    "--checkpoint.every_n_epochs=1",
    "--checkpoint.save_top_k=-1",
    "--checkpoint.filename={epoch}",
    "--trainer.callbacks+=runs_program.Norms",
]


class Norms(Callback):
    """Writes the gradient norm of each optimizer step, before and after clipping, to norms.jsonl."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        def after_step(optimizer: Any, *_: Any) -> None:
            if optimizer.param_groups[0]["lr"] != 0:  # torch makes a step with rate 0 to initialize the optimizer state
                self.write(trainer, pl_module, "clipped")

        trainer.optimizers[0].register_step_post_hook(after_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.write(trainer, pl_module, "norm")

    def write(self, trainer: Any, pl_module: Any, kind: str) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        norm = sum(g.double().square().sum().item() for g in whole) ** 0.5
        if trainer.is_global_zero:
            with (Path(trainer.default_root_dir) / "norms.jsonl").open("a") as file:
                file.write(json.dumps({"step": trainer.global_step, "kind": kind, "norm": norm}) + "\n")


if __name__ == "__main__":
    root, runs = sys.argv[1], json.loads(sys.argv[2])
    for name, arguments in runs.items():
        place = f"{root}/{name}"
        folders = [f"--trainer.default_root_dir={place}", f"--trainer.logger.save_dir={place}"]
        run(["fit", *SHORT, *arguments, *folders])
    leave(0)
