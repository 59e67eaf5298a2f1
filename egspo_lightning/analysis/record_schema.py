"""Token records: what is in their files, and where those are. The callback writes by it, ``analysis`` reads by it.

A run keeps them in ``token_records/`` of its log folder. Each recorded collection gives each rank two Parquet files:
``tokens-NNNNNN-rank-R.parquet``, a row a token, and ``completions-NNNNNN-rank-R.parquet``, a row a completion, where N
counts collections from 0. ``completion_id`` joins the two. The sentence of a column below is also in the files, as the
metadata of its field, and ``VERSION`` is in the metadata of the schema.
"""

from pathlib import Path

import pyarrow as pa

VERSION = "1"
"""Changes whenever a column goes, or comes to mean something else; a new column leaves it."""
VERSION_KEY = b"egspo_token_records"
FOLDER = "token_records"
STAGE_MARK = "stage_mark"
"""Scalars in TensorBoard under this name are lines in its charts, not metrics."""


def _column(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, metadata={"meaning": meaning})


_KEYS = [
    _column("collection", pa.int32(), "the iteration: number of the rollout collection, from 0"),
    _column("stage", pa.string(), "stage of training: egspo"),
    _column("policy_version", pa.int64(), "optimizer steps that the policy had taken when it sampled"),
    _column("problem_id", pa.string(), "id of the problem, as its source gives it"),
    _column("completion_id", pa.string(), "collection/rank/row: unique in a run"),
]

TOKENS = pa.schema(
    [
        *_KEYS,
        _column("position", pa.int32(), "place in the completion, from 0"),
        _column("token_id", pa.int32(), "id in the tokenizer's vocabulary"),
        _column("token", pa.string(), "the token decoded by itself; a part of a character becomes U+FFFD"),
        _column("entropy", pa.float32(), "H_t, nats: of the distribution that the token was sampled from"),
        _column("old_logprob", pa.float32(), "log pi_old(y_t), nats, at the sampling temperature"),
        _column("is_high_entropy", pa.bool_(), "whether H_t >= tau: the gate lets the whole update through"),
        _column("phi", pa.float32(), "phi_t: weight that a low-entropy token has; also given where it is not used"),
        _column("token_weight", pa.float32(), "g_t before the first update, rescaling included"),
        _column("advantage", pa.float32(), "A_t"),
        _column("ratio", pa.float32(), "pi(y_t) / pi_old(y_t) after the last update on the collection"),
        _column("entropy_after", pa.float32(), "H_t of the policy after the last update on the collection, nats"),
        _column("reward", pa.float32(), "reward of the completion"),
        _column("threshold", pa.float32(), "tau, nats; -inf where the gate is open"),
    ],
    metadata={VERSION_KEY: VERSION.encode()},
)

COMPLETIONS = pa.schema(
    [
        *_KEYS,
        _column("problem", pa.string(), "text of the problem"),
        _column("completion", pa.string(), "text of the completion, without special tokens"),
        _column("gold", pa.string(), "the reference answer"),
        _column("extracted", pa.string(), "the answer found in the completion; null where none was"),
        _column("reward", pa.float32(), "reward"),
        _column("is_correct", pa.bool_(), "the grader's verdict"),
        _column("length", pa.int32(), "tokens, EOS included"),
        _column("is_truncated", pa.bool_(), "whether the length limit was reached before an EOS"),
    ],
    metadata={VERSION_KEY: VERSION.encode()},
)


def file_of(log_dir: str | Path, kind: str, collection: int, rank: int) -> Path:
    """The file of a rank's ``tokens`` or ``completions``."""
    return Path(log_dir) / FOLDER / f"{kind}-{collection:06d}-rank-{rank}.parquet"


def files_of(log_dir: str | Path, kind: str) -> dict[Path, int]:
    """The files of all ranks that are there, in order, with the number of their collection."""
    paths = sorted((Path(log_dir) / FOLDER).glob(f"{kind}-*-rank-*.parquet"))
    return {path: int(path.name.removeprefix(f"{kind}-").split("-")[0]) for path in paths}
