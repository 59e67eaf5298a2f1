"""Shows which tokens are uncertain, and how the gate divides them: histograms."""

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.callbacks.access import data_of, tensorboard_writer
from egspo_lightning.errors import require
from egspo_lightning.ops.gate import high_entropy_mask


class EntropyHistogram(Callback):
    """Logs histograms of token entropy, of all tokens and of high and low ones apart, to TensorBoard.

    The curves of threshold and gate are metrics (``gate/*``) that training logs itself.

    Args:
        every_n_collections: How often; 0 is never.
    """

    def __init__(self, every_n_collections: int = 1) -> None:
        super().__init__()
        field = "entropy_histogram.every_n_collections"
        require(every_n_collections >= 0, field, every_n_collections, "at least 0")
        self.every_n_collections = every_n_collections

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the collection that this epoch trained on."""
        data = data_of(trainer)
        writer = tensorboard_writer(trainer)
        if writer is None or data.collection is None or not self.every_n_collections:
            return
        if (data.num_collections - 1) % self.every_n_collections:
            return
        rollout = data.collection.rollout
        sampled = rollout.sampled_mask
        high = high_entropy_mask(rollout.entropies, sampled, rollout.threshold)
        for name, mask in (("all", sampled), ("high", high), ("low", sampled & ~high)):
            if mask.any():
                writer.add_histogram(f"entropy/{name}", rollout.entropies[mask], trainer.global_step)
