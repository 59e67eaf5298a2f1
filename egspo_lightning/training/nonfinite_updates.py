"""Non-finite losses and gradients: all ranks skip the optimizer step, count it and keep its batch for replay.

A skipped step leaves the weights as they were, so ``egspo replay`` can compute the bad micro-batch again.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from egspo_lightning.checkpointing.serialization import from_plain, to_plain
from egspo_lightning.errors import UserError
from egspo_lightning.ops.objective import Coefficients
from egspo_lightning.types import ExpertBatch, RolloutBatch, Stage, TrainingBatch


class NonFiniteError(UserError):
    """Too many consecutive non-finite steps; the message names the micro-batch and the file that replays it."""


class Part(NamedTuple):
    """A micro-batch of the present optimizer step."""

    number: int
    """Number of the micro-batch within the phase."""
    batch: TrainingBatch
    coefficients: Coefficients | None
    """Weights of the loss terms; None in stage SFT."""
    loss: Tensor


class FiniteUpdates:
    """Detects and counts optimizer steps with a non-finite loss or gradient; ``most_in_a_row`` should end the run."""

    def __init__(self, most_in_a_row: int) -> None:
        self.most_in_a_row = most_in_a_row
        self.num_bad = self.num_in_a_row = 0
        self.bad_part: Part | None = None
        """A micro-batch of the latest bad step, on this rank."""
        self._parts: list[Part] = []

    def note(self, part: Part) -> None:
        """Record a micro-batch after its forward pass."""
        self._parts.append(part)

    def judge(self, parameters: Iterable[nn.Parameter], total: Callable[[Tensor], Tensor], *, scaled: bool) -> bool:
        """Whether to skip the optimizer step, the same on every rank. Collective; called once per step.

        Args:
            parameters: those with gradients, over all micro-batches
            total: adds a tensor over all ranks
            scaled: whether a loss scaler (float16) handles infinite gradients itself
        """
        parts, self._parts = self._parts, []
        losses = torch.stack([part.loss.float() for part in parts])
        bad = ~torch.isfinite(losses)
        bad_gradient = losses.new_tensor(False, dtype=torch.bool) if scaled else _any_bad_gradient(parameters, losses)
        if total(torch.stack([bad.any(), bad_gradient.to(bad.device)]).float()).sum().item() == 0:
            self.num_in_a_row = 0
            return False
        self.num_bad += 1
        self.num_in_a_row += 1
        self.bad_part = parts[int(bad.int().argmax())]  # the first if only a gradient is bad
        return True

    @property
    def must_stop(self) -> bool:
        """Whether too many consecutive steps were bad."""
        return self.num_in_a_row >= self.most_in_a_row

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"num_bad": self.num_bad, "num_in_a_row": self.num_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts."""
        self.num_bad, self.num_in_a_row = state["num_bad"], state["num_in_a_row"]


def _any_bad_gradient(parameters: Iterable[nn.Parameter], like: Tensor) -> Tensor:
    whole = (p.grad for p in parameters if p.grad is not None)
    own = (gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in whole)
    gradients = [gradient for gradient in own if gradient.numel() > 0]  # some ranks hold no rows of a small tensor
    if not gradients:
        return like.new_tensor(False, dtype=torch.bool)
    norms = torch.stack(torch._foreach_norm(gradients))  # a norm is non-finite if any element is
    return ~torch.isfinite(norms).all()


def describe(part: Part) -> str:
    """Text about a micro-batch for error messages."""
    stage, rollout, expert = part.batch
    rows = sum(len(batch.input_ids) for batch in (rollout, expert) if batch is not None)
    return f"micro-batch {part.number} of the phase (stage {stage}, {rows} rows, loss {part.loss.item():.4g})"


def pack(part: Part) -> dict[str, Any]:
    """A micro-batch as plain data for a checkpoint, which ``torch.load(weights_only=True)`` reads."""
    batch, weights = part.batch, part.coefficients
    return {
        "number": part.number,
        "stage": str(batch.stage),
        "loss": float(part.loss),
        "coefficients": None if weights is None else {k: float(v) for k, v in weights._asdict().items()},
        "rollout": None if batch.rollout is None else to_plain(batch.rollout),
        "expert": None if batch.expert is None else to_plain(batch.expert),
    }


def unpack(data: dict[str, Any]) -> Part:
    """The micro-batch from ``pack``'s data."""
    rollout, expert, weights = data["rollout"], data["expert"], data["coefficients"]
    return Part(
        number=data["number"],
        batch=TrainingBatch(
            Stage(data["stage"]),
            None if rollout is None else from_plain(RolloutBatch, rollout),
            None if expert is None else from_plain(ExpertBatch, expert),
        ),
        coefficients=None if weights is None else Coefficients(**weights),
        loss=torch.tensor(data["loss"]),
    )


def bad_tokens(mask: Tensor, named: Sequence[tuple[str, Tensor | None]]) -> list[tuple[int, int, str, float]]:
    """(row, position, name, value) of every non-finite value on the masked tokens; mask and values are (B, T)."""
    return [
        (row, position, name, values[row, position].item())
        for name, values in named
        if values is not None
        for row, position in (mask & ~torch.isfinite(values)).nonzero().tolist()
    ]
