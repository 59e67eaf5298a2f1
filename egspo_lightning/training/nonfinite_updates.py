"""Non-finite losses and gradients: all ranks skip the optimizer step, count it and keep its batch for replay.

A skipped step leaves the weights as they were, so ``egspo replay`` can compute the bad micro-batch again.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from egspo_lightning.checkpointing.serialization import from_plain, to_plain
from egspo_lightning.errors import UserError
from egspo_lightning.ops.objective import Coefficients
from egspo_lightning.types import Stage, TrainingBatch


class RecordedMicroBatch(NamedTuple):
    """A micro-batch of the present optimizer step, with all that its loss depends on besides the weights."""

    number: int
    """Number of the micro-batch within the phase."""
    batch: TrainingBatch
    coefficients: Coefficients | None
    """Weights of the loss terms; None in stage SFT."""
    loss: Tensor

    def __str__(self) -> str:
        stage, rollout, expert = self.batch
        rows = sum(len(batch.input_ids) for batch in (rollout, expert) if batch is not None)
        return f"micro-batch {self.number} of the phase (stage {stage}, {rows} rows, loss {self.loss.item():.4g})"


class FiniteUpdates:
    """Detects and counts optimizer steps with a non-finite loss or gradient; ``most_in_a_row`` should end the run."""

    def __init__(self, most_in_a_row: int) -> None:
        self.most_in_a_row = most_in_a_row
        self.num_bad = self.num_in_a_row = 0
        self.micro_batches: list[RecordedMicroBatch] = []
        """The micro-batches of the present optimizer step, recorded after their forward passes."""
        self.bad_micro_batch: RecordedMicroBatch | None = None
        """A micro-batch of the latest bad step, on this rank."""

    def judge(self, parameters: Iterable[nn.Parameter], total: Callable[[Tensor], Tensor], *, scaled: bool) -> bool:
        """Whether to skip the optimizer step, the same on every rank. Collective; called once per step.

        Args:
            parameters: those with gradients, over all micro-batches
            total: adds a tensor over all ranks
            scaled: whether a loss scaler (float16) handles infinite gradients itself
        """
        recorded, self.micro_batches = self.micro_batches, []
        bad = ~torch.stack([each.loss.float() for each in recorded]).isfinite()
        bad_gradient = bad.new_tensor(False) if scaled else _any_bad_gradient(parameters, bad)
        if total(torch.stack([bad.any(), bad_gradient.to(bad.device)]).float()).sum().item() == 0:
            self.num_in_a_row = 0
            return False
        self.num_bad += 1
        self.num_in_a_row += 1
        self.bad_micro_batch = recorded[int(bad.int().argmax())]  # the first if only a gradient is bad
        return True

    @property
    def must_stop(self) -> bool:
        """Whether too many consecutive steps were bad, the last of them in this run."""
        return self.bad_micro_batch is not None and self.num_in_a_row >= self.most_in_a_row

    def error(self, path: Path, num_steps: int, phase: int) -> UserError:
        """The error that ends the run: it names the micro-batch, and the checkpoint ``path`` that replays it."""
        return UserError(
            f"{self.num_in_a_row} updates in a row had a loss or gradient that is not finite, the last at "
            f"{self.bad_micro_batch} after {num_steps} optimizer steps, phase {phase}. They were skipped; the weights "
            f"are unchanged. To see which tokens: egspo replay {path}. Lower the learning rate, clip the gradient "
            "(trainer.gradient_clip_val), or look at the data, then resume."
        )

    def state_dict(self) -> dict[str, Any]:
        """The counts and, if the run must stop, the micro-batch to replay."""
        bad = {"bad_micro_batch": to_plain(self.bad_micro_batch)} if self.must_stop else {}
        return {"num_bad": self.num_bad, "num_in_a_row": self.num_in_a_row} | bad

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts."""
        self.num_bad, self.num_in_a_row = state["num_bad"], state["num_in_a_row"]


def _any_bad_gradient(parameters: Iterable[nn.Parameter], like: Tensor) -> Tensor:
    whole = (p.grad for p in parameters if p.grad is not None)
    own = (gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in whole)
    gradients = [gradient for gradient in own if gradient.numel() > 0]  # some ranks hold no rows of a small tensor
    if not gradients:
        return like.new_tensor(False)
    norms = torch.stack(torch._foreach_norm(gradients))  # a norm is non-finite if any element is
    return ~torch.isfinite(norms).all()


def unpack(data: dict[str, Any]) -> RecordedMicroBatch:
    """The micro-batch from a checkpoint, into which ``to_plain`` has put it."""
    batch, weights = from_plain(TrainingBatch, data["batch"]), data["coefficients"]
    return RecordedMicroBatch(
        number=data["number"],
        batch=batch._replace(stage=Stage(batch.stage)),
        coefficients=None if weights is None else Coefficients(**weights),
        loss=data["loss"],
    )


def bad_tokens(mask: Tensor, named: Sequence[tuple[str, Tensor | None]]) -> list[tuple[int, int, str, float]]:
    """(row, position, name, value) of every non-finite value on the masked tokens; mask and values are (B, T)."""
    return [
        (row, position, name, values[row, position].item())
        for name, values in named
        if values is not None
        for row, position in (mask & ~torch.isfinite(values)).nonzero().tolist()
    ]
