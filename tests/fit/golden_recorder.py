"""Callback that records losses, gradient norms and phase metrics of stage EGSPO.

It depends on Lightning, torch and ``pl_module.stage`` alone, so that it also runs in other checkouts.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

import egspo_lightning

FILE = "recorded.json"
NUM_STEPS = 8


class GoldenRecorder(Callback):
    """Writes the first optimizer steps of stage EGSPO to recorded.json in the trainer's root folder.

    Each step has its loss and its gradient norm before clipping. The last step of a phase also has the phase's metrics.
    A method without expert data keeps ``loss/sft`` of the last SFT epoch there.
    Python's JSON keeps each float exactly. ``weights`` is a hash over all final parameters; their names and their order
    do not matter.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.norm: float | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        package = Path(egspo_lightning.__file__).resolve()
        if not package.is_relative_to(Path.cwd().resolve()):
            raise RuntimeError(f"This run imported {package}, which is outside its checkout {Path.cwd()}.")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [whole(p.grad) for p in pl_module.parameters() if p.grad is not None]
        self.norm = sum(g.double().square().sum().item() for g in gradients) ** 0.5

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())
        if self.norm is None:
            return  # a micro-batch before the last of its optimizer step
        if pl_module.stage == "egspo" and len(self.steps) < NUM_STEPS:
            loss = over_ranks(sum(self.losses) / len(self.losses))
            self.steps.append({"loss": loss, "gradient_norm": self.norm})
        self.losses, self.norm = [], None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.steps:
            self.steps[-1] |= {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("loss/") or name in ("gate/threshold", "rollout/reward_mean", "rollout/reward_std")
            }

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        digests = sorted(digest(whole(p.detach())) for p in pl_module.parameters())
        recorded = {"steps": self.steps, "weights": hashlib.sha256("".join(digests).encode()).hexdigest()}
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / FILE).write_text(json.dumps(recorded))


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor. Collective if the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def over_ranks(value: float) -> float:
    """Mean of a number over all ranks. Collective."""
    if not torch.distributed.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return total.item() / torch.distributed.get_world_size()


def digest(tensor: Tensor) -> str:
    tensor = tensor.cpu().contiguous()
    kind = f"{tensor.dtype} {tuple(tensor.shape)} "
    return hashlib.sha256(kind.encode() + tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
