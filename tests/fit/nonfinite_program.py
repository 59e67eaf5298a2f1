"""A short run under torchrun in which the loss of rank 1 is NaN once.

    torchrun --nproc-per-node=2 nonfinite_program.py FOLDER

The gradients stay finite, so rank 0 cannot detect the NaN in them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from egspo_lightning.cli import main as cli
from egspo_lightning.cli.process_exit import leave

SHORT = [
    "--config=configs/quickstart.yaml",
    "--trainer.max_epochs=2",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.strategy=ddp",
    "--trainer.devices=2",
    "--data.demonstrations.init_args.num_demonstrations=16",
    "--data.sft_batch_size=4",
    "--data.benchmarks=null",
    "--data.num_problems=2",
    "--data.num_generations=2",
    "--data.max_completion_length=40",
    "--hf_export.enabled=false",
    "--stage_transition.after_epochs=1",
]


class OneBadLoss(Callback):
    """Makes one loss of rank 1 NaN, and records which optimizer steps changed the weights."""

    def __init__(self) -> None:
        self.moved: list[bool] = []
        self.before = torch.empty(0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = weights(pl_module)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            (recorded,) = pl_module._finite.micro_batches
            pl_module._finite.micro_batches = [recorded._replace(loss=recorded.loss * float("nan"))]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.moved.append(not torch.equal(self.before, weights(pl_module)))


def weights(module: Any) -> torch.Tensor:
    """All weights of the policy as one vector."""
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()]).clone()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    cli.CALLBACKS["one_bad_loss"] = OneBadLoss
    finished = cli.run(["fit", *SHORT, f"--trainer.default_root_dir={folder}"])
    watcher = next(c for c in finished.trainer.callbacks if isinstance(c, OneBadLoss))
    report = {
        "num_bad": finished.model._finite.num_bad,
        "moved": watcher.moved,
        "weights": weights(finished.model).double().sum().item(),
    }
    (folder / f"rank-{finished.trainer.global_rank}.json").write_text(json.dumps(report))
    leave(0)
