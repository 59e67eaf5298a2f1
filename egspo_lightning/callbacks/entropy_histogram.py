"""Shows which tokens are uncertain, and how the gate divides them: histograms."""

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.callbacks.logger_displays import SHOWS_HISTOGRAMS, log_histograms, note_once
from egspo_lightning.callbacks.trainer_access import data_of
from egspo_lightning.errors import require
from egspo_lightning.ops.gate import high_entropy_mask


class EntropyHistogram(Callback):
    """Logs histograms of token entropy, of all tokens and of high and low ones apart.

    To TensorBoard and Weights & Biases; other loggers have no histograms, and get their means and quantiles as metrics
    (``entropy/all/mean``, ``.../p10``, ``.../p50``, ``.../p90``). The curves of threshold and gate are metrics
    (``gate/*``) that training logs itself.

    Args:
        every_n_rollout_batches: How often; 0 is never.
    """

    def __init__(self, every_n_rollout_batches: int = 1) -> None:
        super().__init__()
        field = "entropy_histogram.every_n_rollout_batches"
        require(every_n_rollout_batches >= 0, field, every_n_rollout_batches, "at least 0")
        self.every_n_rollout_batches = every_n_rollout_batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what loggers without histograms get."""
        if self.every_n_rollout_batches:
            instead = "has no histograms; mean and quantiles of token entropy are logged as metrics, entropy/*."
            note_once(trainer, "entropy_histogram", SHOWS_HISTOGRAMS, instead)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the collection that this epoch trained on."""
        data = data_of(trainer)
        if data.rollouts is None or not self.every_n_rollout_batches:
            return
        if (data.num_rollout_batches - 1) % self.every_n_rollout_batches:
            return
        rollout = data.rollouts.batch
        sampled = rollout.sampled_mask
        high = high_entropy_mask(rollout.entropies, sampled, rollout.threshold)
        masks = {"entropy/all": sampled, "entropy/high": high, "entropy/low": sampled & ~high}
        log_histograms(trainer, {tag: rollout.entropies[mask] for tag, mask in masks.items() if mask.any()})
