"""What the gate costs: whole iterations with it, and the same without a gate and without any entropy: `--help`.

Sample, grade, score, update. Each pair goes through the same iteration from the same weights, so it samples the same
completions. The paper (arXiv 2602.03309) reports 3.4 %.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from comparison.arguments import told
from egspo_lightning import policy
from egspo_lightning.ops.attenuation import ConfidenceAttenuation
from egspo_lightning.ops.gate import OpenGate, QuantileGate
from egspo_lightning.ops.token_stats import TokenStats, token_stats
from egspo_lightning.rollout import transformers_engine
from egspo_lightning.rollout.transformers_engine import Drawn, sample_tokens
from egspo_lightning.types import Sampling
from measuring.listeners import Replay
from measuring.report import add_workloads, parse, parser, publish
from measuring.timing import Reading, ratio, seconds
from measuring.workloads import NAMES, Workload, choose, found, train

NAME = "gate_overhead"
GATED, BARE = "EGSPO", "no gate, no entropy"

_policy: Any = policy  # as Any: the names in these modules are replaced
_engine: Any = transformers_engine


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(NAME, "Time of an iteration with the gate over that without.", rounds=25)
    flags.add_argument("--flags", nargs="*", default=[], help="further flags of the project's own command line")
    add_workloads(flags, "quickstart")
    arguments = parse(flags, argv)
    Replay.switches = {GATED: _gated, BARE: _bare}
    tables = {NAMES[name]: _compare(choose(name, arguments.models), arguments) for name in arguments.workloads}
    publish(NAME, arguments, tables, paper_percent=3.4)
    return 0


def _compare(workload: Workload, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    ways = {"ways": [GATED, BARE], "rounds": arguments.rounds}
    try:
        cli = train(workload, 2 * (arguments.rounds + 1), [(Replay, ways)], *arguments.flags)
    finally:
        _compute_entropies(True)
    replay: Replay = found(cli, Replay)
    _require_same(replay)
    return _rows(replay.readings)


def _gated(module: Any) -> None:
    _compute_entropies(True)
    _set_gate(module, QuantileGate(0.2))


def _bare(module: Any) -> None:
    _compute_entropies(False)
    _set_gate(module, OpenGate())


def _compute_entropies(is_on: bool) -> None:
    """Where a run computes them: in updates and scoring, and while it samples."""
    _policy.token_stats = token_stats if is_on else logprobs_alone
    _engine.sample_tokens = sample_tokens if is_on else draws_alone


def _set_gate(module: Any, gate: Any) -> None:
    object.__setattr__(module.admission, "gate", gate)
    object.__setattr__(module.admission, "attenuation", ConfidenceAttenuation())


def logprobs_alone(
    hidden_states: torch.Tensor, lm_head: Any, input_ids: torch.Tensor, *, temperature: float, with_entropies: bool
) -> TokenStats:
    """What a trainer without entropies would compute; they are 0."""
    logits = lm_head(hidden_states).float() / temperature
    logprobs = -F.cross_entropy(logits, input_ids, reduction="none")
    return TokenStats(logprobs, torch.zeros_like(logprobs))


def draws_alone(logits: torch.Tensor, uniforms: torch.Tensor | None, sampling: Sampling) -> Drawn:
    """The same draws as the engine's, and their log-probabilities; the entropies are 0."""
    assert uniforms is not None, "rollouts are not greedy"
    probs = torch.softmax(logits.float() / sampling.temperature, -1)
    tokens = _engine._invert(probs, uniforms, sampling.top_p)
    logprobs = probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).log()
    return Drawn(tokens, logprobs, torch.zeros_like(logprobs))


def _require_same(replay: Replay) -> None:
    one, other = (replay.collections[way].rollout for way in (GATED, BARE))
    if not torch.equal(one.input_ids, other.input_ids):
        raise RuntimeError("The two ways have sampled different completions, so their times cannot be compared.")


def _rows(readings: dict[str, list[Reading]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for way, mine in readings.items():
        row = {"way": way, "pairs": len(mine), "seconds": str(seconds(mine)), "CPU seconds": str(seconds(mine, "cpu"))}
        for kind, name in (("wall", "overhead, %"), ("cpu", "CPU overhead, %")):
            part = ratio(mine, readings[BARE], kind)  # type: ignore[arg-type]
            row[name] = "" if way == BARE else " ".join(f"{100 * (value - 1):+.2f}" for value in part)
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(told(main))
