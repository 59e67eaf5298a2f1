"""Schema of token records: the Parquet files that TokenRecords writes and ``analysis`` reads.

They are in ``token_records/`` of the log folder. For each recorded rollout batch each rank writes two files:
``tokens-NNNNNN-rank-R.parquet`` with a row a token, and ``completions-NNNNNN-rank-R.parquet`` with a row a completion.
N counts rollout batches from 0. ``completion_id`` joins the two. The files hold the descriptions below as field
metadata, and ``VERSION`` as schema metadata.
"""

from pathlib import Path

import pyarrow as pa

VERSION = "1"
"""Version of the schema: changes when a column is removed or changes its meaning, not when one is added."""
VERSION_KEY = b"egspo_token_records"
FOLDER = "token_records"
STAGE_MARK = "stage_mark"
"""Prefix of TensorBoard scalars that are lines in its charts, not metrics."""


def _column(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, metadata={"meaning": meaning})


_KEYS = [
    _column("rollout_batch", pa.int32(), "number of the rollout batch, from 0"),
    _column("stage", pa.string(), "stage of training: egspo"),
    _column("policy_version", pa.int64(), "optimizer steps that the sampling policy had taken"),
    _column("problem_id", pa.string(), "id of the problem in its source"),
    _column("completion_id", pa.string(), "rollout batch/rank/row: unique in a run"),
]
_MASKED = _column(
    "is_masked", pa.bool_(), "whether the loss leaves the completion out (truncated, with mask_truncated)"
)

TOKENS = pa.schema(
    [
        *_KEYS,
        _column("position", pa.int32(), "position in the completion, from 0"),
        _column("token_id", pa.int32(), "id in the tokenizer's vocabulary"),
        _column("token", pa.string(), "the token decoded alone; part of a character becomes U+FFFD"),
        _column("entropy", pa.float32(), "H_t, nats: entropy of the distribution that the token was sampled from"),
        _column("old_logprob", pa.float32(), "log pi_old(y_t), nats, at the sampling temperature"),
        _column(
            "is_high_entropy",
            pa.bool_(),
            "whether the token takes the full update; true without a gate, false if masked",
        ),
        _column(
            "phi",
            pa.float32(),
            "phi_t: weight of a low-entropy token, also given for others; g_t without a gate",
        ),
        _column("token_weight", pa.float32(), "g_t before the first optimizer step, with rescaling; 0 if masked"),
        _column("advantage", pa.float32(), "A_t; 0 if masked"),
        _column("ratio", pa.float32(), "pi(y_t) / pi_old(y_t) after the last optimizer step on the rollout batch"),
        _column(
            "entropy_after", pa.float32(), "H_t of the policy after the last optimizer step on the rollout batch, nats"
        ),
        _column("reward", pa.float32(), "reward of the completion"),
        _column("threshold", pa.float32(), "tau, nats; -inf where the gate is open"),
        _MASKED,
    ],
    metadata={VERSION_KEY: VERSION.encode()},
)

COMPLETIONS = pa.schema(
    [
        *_KEYS,
        _column("problem", pa.string(), "text of the problem"),
        _column("completion", pa.string(), "text of the completion, without special tokens"),
        _column("gold", pa.string(), "the gold answer"),
        _column("extracted", pa.string(), "the answer found in the completion; null if none"),
        _column("reward", pa.float32(), "reward"),
        _column("is_correct", pa.bool_(), "the grader's verdict"),
        _column("length", pa.int32(), "length in tokens, with EOS"),
        _column("is_truncated", pa.bool_(), "whether the length limit came before an EOS"),
        _MASKED,
    ],
    metadata={VERSION_KEY: VERSION.encode()},
)


def file_of(log_dir: str | Path, kind: str, number: int, rank: int) -> Path:
    """Path of a rank's ``tokens`` or ``completions`` of a rollout batch."""
    return Path(log_dir) / FOLDER / f"{kind}-{number:06d}-rank-{rank}.parquet"


def files_of(log_dir: str | Path, kind: str) -> dict[Path, int]:
    """Existing files of all ranks, in order, with the number of their rollout batch."""
    paths = sorted((Path(log_dir) / FOLDER).glob(f"{kind}-*-rank-*.parquet"))
    return {path: int(path.name.removeprefix(f"{kind}-").split("-")[0]) for path in paths}
