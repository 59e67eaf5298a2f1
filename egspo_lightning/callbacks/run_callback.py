"""Base classes of callbacks with attributes that belong to a run, and are kept in checkpoints."""

import copy
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from egspo_lightning.training.fit_loop import begins_run


class RunCallback(Callback):
    """Callback whose attributes named in ``of_run`` and ``checkpointed`` are reset when a run begins."""

    of_run: ClassVar[tuple[str, ...]] = ()
    checkpointed: ClassVar[tuple[str, ...]] = ()
    _first: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start a run, if this is one; a checkpoint is loaded later."""
        if self._first is None:
            self._first = copy.deepcopy({name: getattr(self, name) for name in (*self.of_run, *self.checkpointed)})
        if stage == TrainerFn.FITTING and begins_run(trainer):
            vars(self).update(copy.deepcopy(self._first))
        super().setup(trainer, pl_module, stage)


class CheckpointedCallback(RunCallback):
    """Callback that writes its attributes named in ``checkpointed`` into checkpoints, and continues from them."""

    def state_dict(self) -> dict[str, Any]:
        """Attributes that a resumed run needs."""
        return {name: getattr(self, name) for name in self.checkpointed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        vars(self).update(state_dict)
