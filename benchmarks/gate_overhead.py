"""What the gate costs: whole iterations with it, and the same without a gate and without any entropy: `--help`.

Sample, grade, score, update. Each pair goes through the same iteration from the same weights, so it samples the same
completions. The paper (arXiv 2602.03309) reports 3.4 %.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from comparison.arguments import told
from egspo_lightning.models import policy
from egspo_lightning.ops.attenuation import ConfidenceAttenuation
from egspo_lightning.ops.gate import OpenGate, QuantileGate
from egspo_lightning.ops.token_stats import TokenStats, token_stats
from egspo_lightning.rollout import transformers_engine
from egspo_lightning.rollout.token_sampling import TokenSampler
from measuring.listeners import Replay
from measuring.report import add_workloads, parse, parser, publish
from measuring.timing import Clock, Reading, median_interval, ratios, seconds, spread
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
    _engine.TokenSampler = TokenSampler if is_on else TokenSamplerWithoutEntropies


def _set_gate(module: Any, gate: Any) -> None:
    object.__setattr__(module.advantage_and_gate, "gate", gate)
    object.__setattr__(module.advantage_and_gate, "attenuation", ConfidenceAttenuation())


def logprobs_alone(*args: Any, with_entropies: bool, **kwargs: Any) -> TokenStats:
    """No entropies, whoever asks for them; they are 0."""
    return token_stats(*args, with_entropies=False, **kwargs)


class TokenSamplerWithoutEntropies(TokenSampler):
    """Draws the same, and does nothing for entropies: a draw leaves its probabilities, whose logarithms are told."""

    def _probabilities(self, logits: torch.Tensor, place: slice) -> torch.Tensor:
        scaled = logits.float() if self._temperature == 1.0 else logits.float() / self._temperature
        return torch.softmax(scaled, -1, out=self._probs[place])

    def _statistics(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = self._probs[: self._num_pending].gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return chosen.log(), torch.zeros_like(chosen)


def _require_same(replay: Replay) -> None:
    one, other = (replay.collections[way].batch for way in (GATED, BARE))
    if not torch.equal(one.input_ids, other.input_ids):
        raise RuntimeError("The two ways have sampled different completions, so their times cannot be compared.")


def _rows(readings: dict[str, list[Reading]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for way, mine in readings.items():
        row = {"way": way, "pairs": len(mine), "seconds": str(seconds(mine)), "CPU seconds": str(seconds(mine, "cpu"))}
        clocks: dict[str, Clock] = {"overhead, %": "wall", "CPU overhead, %": "cpu"}
        for name, kind in clocks.items():
            row[name] = "" if way == BARE else _told([100 * (r - 1) for r in ratios(mine, readings[BARE], kind)])
        rows.append(row)
    return rows


def _told(percents: list[float]) -> str:
    """Median with its 95 % interval, and quartiles."""
    median, low, high = spread(percents)
    interval = " to ".join(f"{end:+.2f}" for end in median_interval(percents))
    return f"{median:+.2f} (95 %: {interval}; quartiles {low:+.2f} and {high:+.2f})"


if __name__ == "__main__":
    sys.exit(told(main))
