"""Overhead of the gate: time of iterations with the gate, relative to iterations without gate and entropies.

An iteration samples, grades, scores and trains. Both iterations of a pair start from the same weights and sample the
same completions. The paper (arXiv 2602.03309) reports an overhead of 3.4 %. Flags: `--help`.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from egspo_lightning.cli.comparison.run_callbacks import callback_flag, find_callback
from egspo_lightning.models import policy
from egspo_lightning.ops.attenuation import ConfidenceAttenuation
from egspo_lightning.ops.gate import OpenGate, QuantileGate
from egspo_lightning.ops.token_stats import TokenStats, token_stats
from egspo_lightning.rollout import transformers_engine
from egspo_lightning.rollout.token_sampling import TokenSampler
from measuring.callbacks import Replay
from measuring.report import add_run_flags, add_workloads, parse, parser, publish
from measuring.script import exit_code
from measuring.timing import Clock, Reading, median_interval, ratios, seconds, spread
from measuring.workloads import NAMES, Workload, choose, train

NAME = "gate_overhead"
GATED, BARE = "EGSPO", "no gate, no entropy"

_policy: Any = policy  # typed as Any, because functions in these modules are replaced
_engine: Any = transformers_engine


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(NAME, "Time of an iteration with the gate, relative to one without.", rounds=25)
    add_run_flags(flags)
    add_workloads(flags, "quickstart")
    arguments = parse(flags, argv)
    Replay.switches = {GATED: _gated, BARE: _bare}
    tables = {NAMES[name]: _compare(choose(name, arguments.models), arguments) for name in arguments.workloads}
    publish(NAME, arguments, tables, paper_percent=3.4)
    return 0


def _compare(workload: Workload, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    replay_flag = callback_flag(Replay, variants=[GATED, BARE], rounds=arguments.rounds)
    try:
        cli = train(workload, 2 * (arguments.rounds + 1), replay_flag, *arguments.flags)
    finally:
        _compute_entropies(True)
    replay = find_callback(cli, Replay)
    _require_same(replay)
    return _rows(replay.readings)


def _gated(module: Any) -> None:
    _compute_entropies(True)
    _set_gate(module, QuantileGate(0.2))


def _bare(module: Any) -> None:
    _compute_entropies(False)
    _set_gate(module, OpenGate())


def _compute_entropies(is_on: bool) -> None:
    """Switch the entropies of forward passes and of sampling on or off."""
    _policy.token_stats = token_stats if is_on else logprobs_only
    _engine.TokenSampler = TokenSampler if is_on else TokenSamplerWithoutEntropies


def _set_gate(module: Any, gate: Any) -> None:
    object.__setattr__(module.advantage_and_gate, "gate", gate)
    object.__setattr__(module.advantage_and_gate, "attenuation", ConfidenceAttenuation())


def logprobs_only(*args: Any, with_entropies: bool, **kwargs: Any) -> TokenStats:
    """``token_stats`` whose entropies are always 0."""
    return token_stats(*args, with_entropies=False, **kwargs)


class TokenSamplerWithoutEntropies(TokenSampler):
    """Draws the same tokens; takes log-probabilities from the probabilities of the draw, and computes no entropies."""

    def _probabilities(self, logits: torch.Tensor, place: slice) -> torch.Tensor:
        scaled = logits.float() if self._temperature == 1.0 else logits.float() / self._temperature
        return torch.softmax(scaled, -1, out=self._probs[place])

    def _statistics(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = self._probs[: self._num_pending].gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return chosen.log(), torch.zeros_like(chosen)


def _require_same(replay: Replay) -> None:
    one, other = (replay.rollouts[variant].batch for variant in (GATED, BARE))
    if not torch.equal(one.input_ids, other.input_ids):
        raise RuntimeError("The two variants sampled different completions, so their times cannot be compared.")


def _rows(readings: dict[str, list[Reading]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for variant, mine in readings.items():
        row = {"variant": variant, "pairs": len(mine), "seconds": str(seconds(mine))}
        row["CPU seconds"] = str(seconds(mine, "cpu"))
        clocks: dict[str, Clock] = {"overhead, %": "wall", "CPU overhead, %": "cpu"}
        for name, kind in clocks.items():
            overheads = [100 * (ratio - 1) for ratio in ratios(mine, readings[BARE], kind)]
            row[name] = "" if variant == BARE else _interval(overheads)
        rows.append(row)
    return rows


def _interval(percents: list[float]) -> str:
    """Median with its 95 % confidence interval, and quartiles."""
    median, low, high = spread(percents)
    interval = " to ".join(f"{end:+.2f}" for end in median_interval(percents))
    return f"{median:+.2f} (95 %: {interval}; quartiles {low:+.2f} and {high:+.2f})"


if __name__ == "__main__":
    sys.exit(exit_code(main))
