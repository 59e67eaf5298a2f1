"""Shows which tokens are uncertain and what the gate makes of them: histograms, and records on disk."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.callbacks.access import data_of, module_of, tensorboard_writer
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.ops.gate import high_entropy_mask
from egspo_lightning.rollout.experience import Collection

RECORDS_FOLDER = "token_records"


class EntropyHistogram(Callback):
    """Logs histograms of token entropy, of high and low tokens apart, and keeps token records as Parquet.

    Each recorded collection becomes a file ``token_records/collection-NNNNNN-rank-R.parquet`` in the log folder, one
    row a completion token. The curves of threshold and gate are metrics (``gate/*``) that training logs itself.

    Args:
        every_n_collections: How often histograms are logged; 0 is never.
        record_every_n_collections: How often tokens are recorded; 0 is never.
        max_recorded_completions: Completions recorded at a time, on each rank.
    """

    def __init__(
        self,
        every_n_collections: int = 1,
        record_every_n_collections: int = 10,
        max_recorded_completions: int = 32,
    ) -> None:
        super().__init__()
        for field, value in (
            ("every_n_collections", every_n_collections),
            ("record_every_n_collections", record_every_n_collections),
            ("max_recorded_completions", max_recorded_completions),
        ):
            if value < 0:
                raise UserError(f"entropy_histogram.{field} must be at least 0, got {value}.")
        self.every_n_collections = every_n_collections
        self.record_every_n_collections = record_every_n_collections
        self.max_recorded_completions = max_recorded_completions

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the collection that this epoch trained on."""
        log_dir = trainer.log_dir
        data = data_of(trainer)
        collection, number = data.collection, data.num_collections - 1
        if collection is None:
            return
        if _is_due(number, self.every_n_collections):
            self._log_histograms(trainer, collection)
        if _is_due(number, self.record_every_n_collections) and log_dir is not None:
            name = f"collection-{number:06d}-rank-{trainer.global_rank}.parquet"
            table = self._table(collection, module_of(pl_module), number)
            _write(table, Path(log_dir) / RECORDS_FOLDER / name)

    def _log_histograms(self, trainer: Trainer, collection: Collection) -> None:
        writer = tensorboard_writer(trainer)
        if writer is None:
            return
        rollout = collection.rollout
        sampled = rollout.sampled_mask
        high = high_entropy_mask(rollout.entropies, sampled, rollout.threshold)
        for name, mask in (("all", sampled), ("high", high), ("low", sampled & ~high)):
            if mask.any():
                writer.add_histogram(f"entropy/{name}", rollout.entropies[mask], trainer.global_step)

    def _table(self, collection: Collection, module: EGSPOModule, number: int) -> pa.Table:
        """One row a completion token of the first completions."""
        rollout = collection.rollout
        mask = rollout.sampled_mask.clone()
        mask[self.max_recorded_completions :] = False
        high, low = module.objective.branch_weights(rollout, module.attenuation, rollout.entropies)
        rows, columns = mask.nonzero(as_tuple=True)
        starts = rollout.completion_mask.int().argmax(-1)
        ids = rollout.input_ids[mask].tolist()
        fields: dict[str, Any] = {
            "collection": [number] * len(ids),
            "policy_version": [rollout.policy_version] * len(ids),
            "problem_id": [collection.completions[row].problem.id for row in rows.tolist()],
            "completion": rows.tolist(),
            "position": (columns - starts[rows]).tolist(),
            "token_id": ids,
            "token": [module.tokenizer.decode([i]) for i in ids],
            "entropy": rollout.entropies[mask].tolist(),
            "old_logprob": rollout.old_logprobs[mask].tolist(),
            "is_high_entropy": (rollout.entropies >= rollout.threshold)[mask].tolist(),
            "token_weight": (high + low)[mask].tolist(),
            "advantage": rollout.advantages[mask].tolist(),
            "reward": rollout.rewards[rows].tolist(),
            "threshold": rollout.threshold.expand_as(rollout.entropies)[mask].tolist(),
        }
        return pa.table(fields)


def _is_due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _write(table: pa.Table, path: Path) -> None:
    """Whole or not at all: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial)
    partial.rename(path)
