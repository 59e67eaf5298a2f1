"""TokenRecords: Parquet files of sampled tokens with entropy, gate weight, advantage and ratio."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from egspo_lightning.analysis.record_schema import COMPLETIONS, TOKENS, file_of, files_of
from egspo_lightning.callbacks.trainer_access import data_of, due_rollout_batch, module_of, outputs_now, resumes_in
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.ops.losses import log_ratio
from egspo_lightning.rollout.rollout_records import CollectedRollouts
from egspo_lightning.training.trainer import log_folder
from egspo_lightning.types import NonNegativeInt, PositiveInt, RolloutBatch


class TokenRecords(Callback):
    """Writes token records as Parquet into ``token_records/`` of the log folder.

    ``analysis.record_schema`` describes the columns. The records cover the first completions of a rollout batch, after
    its last optimizer step; one more forward pass gives the ratio. Each rank writes its own files. A resumed run
    removes the records of rollout batches that it samples again, so that none is recorded twice.

    Args:
        every_n_rollout_batches: Interval in rollout batches; 0 records none.
        max_completions: Completions recorded at a time, on each rank; expert solutions are left out.
    """

    def __init__(self, every_n_rollout_batches: NonNegativeInt = 10, max_completions: PositiveInt = 32) -> None:
        self.every_n_rollout_batches, self.max_completions = every_n_rollout_batches, max_completions

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the records of rollout batches that a resumed run samples again.

        Raises:
            UserError: the folder holds records of another run.
        """
        if not self.every_n_rollout_batches:
            return
        log_dir, first = log_folder(trainer), data_of(trainer).phases.num_rollout_batches
        stale = [p for kind in ("tokens", "completions") for p, n in files_of(log_dir, kind).items() if n >= first]
        if stale and not resumes_in(trainer, log_dir):
            raise UserError(
                f"token_records: {log_dir} holds the records of another run. Give another trainer.default_root_dir, "
                "keep trainer.logger on, which gives each run its own folder, or delete them."
            )
        if stale and trainer.is_global_zero:
            for path in stale:
                path.unlink()
            rank_zero_info(
                f"Token records: removed {len(stale)} files of rollout batches {first} and later, {log_dir}."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the rollout batch of the ending phase."""
        rollouts = due_rollout_batch(trainer, self.every_n_rollout_batches)
        if rollouts is not None:
            number, rank = data_of(trainer).phases.num_rollout_batches - 1, trainer.global_rank
            tables = record(rollouts, module_of(pl_module), number, rank, self.max_completions)
            write(tables, log_folder(trainer), number, rank)


def record(
    rollouts: CollectedRollouts, module: EGSPOModule, number: int, rank: int, max_completions: int
) -> dict[str, pa.Table]:
    """Make the tables ``completions`` and ``tokens`` of a rollout batch's first ``max_completions``. Collective.

    ``module`` has taken the optimizer steps on the rollouts. ``number`` counts rollout batches from 0.
    """
    rollout = rollouts.batch
    chosen = (~rollout.is_expert).nonzero().flatten()[:max_completions]
    completions = [rollouts.completions[row] for row in chosen.tolist()]
    whole: dict[str, list[Any]] = {
        "rollout_batch": [number] * len(completions),
        "stage": [str(module.stage)] * len(completions),
        "policy_version": [rollout.policy_version] * len(completions),
        "problem_id": _storable(completion.problem.id for completion in completions),
        "completion_id": [f"{number}/{rank}/{row}" for row in chosen.tolist()],
        "problem": _storable(completion.problem.problem for completion in completions),
        "completion": _storable(completion.text for completion in completions),
        "gold": _storable(completion.problem.answer for completion in completions),
        "extracted": _storable(completion.extracted for completion in completions),
        "reward": rollout.rewards[chosen].tolist(),
        "is_correct": [completion.correct for completion in completions],
        "length": [len(completion.token_ids) for completion in completions],
        "is_truncated": [completion.is_truncated for completion in completions],
        "is_masked": rollout.is_masked[chosen].tolist(),
    }
    tokens = {name: values.cpu().numpy() for name, values in _token_columns(rollout, module, chosen).items()}
    token_ids, rows = tokens["token_id"].tolist(), rollout.sampled_mask[chosen].nonzero()[:, 0].tolist()
    texts = {token_id: module.tokenizer.decode([token_id]) for token_id in set(token_ids)}
    shared = {name: [whole[name][row] for row in rows] for name in TOKENS.names if name in whole}
    shared["token"] = [texts[token_id] for token_id in token_ids]
    return {"completions": pa.table(whole, COMPLETIONS), "tokens": pa.table(shared | tokens, TOKENS)}


def _token_columns(rollout: RolloutBatch, module: EGSPOModule, chosen: Tensor) -> dict[str, Tensor]:
    """The columns of TOKENS that tensors hold, for the tokens of the chosen rows in order."""
    weights = rollout.high_weights + rollout.low_weights
    mask, gated = rollout.sampled_mask[chosen], rollout.gated_mask[chosen]
    after = outputs_now(module, rollout.input_ids[chosen], mask)
    starts = mask.int().argmax(-1, keepdim=True)
    aligned = {
        "position": torch.arange(mask.shape[1], device=mask.device) - starts,
        "token_id": rollout.input_ids[chosen],
        "entropy": rollout.entropies[chosen],
        "old_logprob": rollout.old_logprobs[chosen],
        "is_high_entropy": rollout.is_high[chosen] & gated,
        "phi": _low_weights(module, rollout)[chosen],
        "token_weight": (weights * rollout.weight_scale)[chosen] * gated,
        "advantage": rollout.advantages[chosen],
        "ratio": log_ratio(after.logprobs, rollout.old_logprobs[chosen]).exp(),
        "entropy_after": after.entropies,
        "threshold": rollout.threshold[chosen].expand_as(mask),
    }
    return {name: values[mask].detach() for name, values in aligned.items()}


def _low_weights(module: EGSPOModule, rollout: RolloutBatch) -> Tensor:
    """phi of every token, high ones included; the token weights themselves if no attenuation makes them."""
    attenuation = getattr(module.token_weights, "attenuation", None)
    if attenuation is None:
        return rollout.high_weights
    phi: Tensor = attenuation.phi(rollout.old_logprobs, rollout.entropies, rollout.threshold)
    return phi


def _storable(texts: Iterable[str | None]) -> list[str | None]:
    """Replace lone surrogates, which JSON allows and UTF-8 does not: they must not stop training."""
    return [None if text is None else text.encode("utf-8", "replace").decode("utf-8") for text in texts]


def write(tables: Mapping[str, pa.Table], log_dir: Path, number: int, rank: int) -> None:
    """Write the tables to files by renaming, so that readers never see half a file."""
    for kind, table in tables.items():
        path = file_of(log_dir, kind, number, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        pq.write_table(table, partial)
        partial.rename(path)
