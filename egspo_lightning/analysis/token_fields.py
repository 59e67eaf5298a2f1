"""Values of a token's hover box, in its order: shared by the notebook view and the report."""

from typing import NamedTuple


class Field(NamedTuple):
    """A column of ``record_schema.TOKENS`` with its label and unit."""

    column: str
    label: str
    unit: str = ""


FIELDS = (
    Field("entropy", "entropy", "nats"),
    Field("threshold", "threshold", "nats"),
    Field("old_logprob", "log-probability", "nats"),
    Field("phi", "phi"),
    Field("token_weight", "weight"),
    Field("advantage", "advantage"),
    Field("ratio", "ratio after update"),
    Field("entropy_after", "entropy after update", "nats"),
    Field("reward", "reward"),
)


def gate_of(is_high: bool, is_masked: bool) -> str:
    """The gate's decision on a token in words."""
    if is_masked:
        return "none: masked, not in the loss"
    return "high: full update" if is_high else "low: attenuated"
