"""EntropyHistogram: histograms of token entropy, split by the gate."""

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.callbacks.logger_displays import SHOWS_HISTOGRAMS, log_histograms, note_once
from egspo_lightning.callbacks.trainer_access import due_rollout_batch, step_of_phase
from egspo_lightning.types import NonNegativeInt


class EntropyHistogram(Callback):
    """Logs histograms of token entropy: all tokens that the gate ranks, high-entropy tokens, low-entropy tokens.

    TensorBoard and Weights & Biases get histograms. Other loggers get mean and quantiles as metrics
    (``entropy/all/mean``, ``.../p10``, ``.../p50``, ``.../p90``). Training itself logs threshold and gate as curves
    (``gate/*``).

    Args:
        every_n_rollout_batches: Interval in rollout batches; 0 logs none.
    """

    def __init__(self, every_n_rollout_batches: NonNegativeInt = 1) -> None:
        self.every_n_rollout_batches = every_n_rollout_batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what loggers without histograms get."""
        if self.every_n_rollout_batches:
            instead = "has no histograms; mean and quantiles of token entropy are logged as metrics, entropy/*."
            note_once(trainer, "entropy_histogram", SHOWS_HISTOGRAMS, instead)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the rollout batch of the ending phase."""
        rollouts = due_rollout_batch(trainer, self.every_n_rollout_batches)
        if rollouts is None:
            return
        rollout = rollouts.batch
        gated = rollout.gated_mask
        high = rollout.is_high & gated
        masks = {"entropy/all": gated, "entropy/high": high, "entropy/low": gated & ~high}
        found = {tag: rollout.entropies[mask] for tag, mask in masks.items() if mask.any()}
        log_histograms(trainer, found, step_of_phase(trainer))
