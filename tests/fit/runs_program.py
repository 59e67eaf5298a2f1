"""Runs of the command line one after another, in one process or under torchrun.

    python runs_program.py FOLDER '{"NAME": [ARGUMENT, ...], ...}'

Each run writes to FOLDER/NAME.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from short_runs import SHORT, fit_all
from torch.distributed.tensor import DTensor

RUN = [
    *SHORT,
    "--trainer.max_epochs=4",
    "--data.reward=ranks_program.EvenBytes",
    "--stage_transition.after_epochs=1",
    "--stage_transition.learning_rate=1e-3",
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
    fit_all(root, {name: [*RUN, *arguments] for name, arguments in runs.items()})
