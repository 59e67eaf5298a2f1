"""ModelCheckpoint, but for the last phase."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class PhaseCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which here also saves after the last of ``max_epochs``, whatever its interval.

    So ``last.ckpt`` of a finished run is the final policy.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if it is time."""
        interval = self._every_n_epochs
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self._every_n_epochs = 1
        super().on_train_epoch_end(trainer, pl_module)
        self._every_n_epochs = interval
