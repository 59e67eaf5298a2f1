"""Compare with TRL's GRPOTrainer: rollouts per second, and time to a held-out accuracy; see `--help`.

Both trainers have the same weights, prompts, completions per prompt, length limit, PPO epochs, minibatches, learning
rate, clipping, reward, precision and threads. Both train GRPO without a KL term, and neither logs nor saves. TRL comes
with `pip install -e ".[bench-peers]"`.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from egspo_lightning.cli.comparison.run_callbacks import callback_flag, find_callback
from egspo_lightning.errors import UserError
from measuring import trl_side
from measuring.accuracy import held_out_accuracy
from measuring.callbacks import IterationTimes, UntilAccurate
from measuring.report import add_run_flags, add_workloads, parse, parser, publish
from measuring.script import exit_code
from measuring.timing import Reading, interleave, ratio, seconds, spread
from measuring.workloads import NAMES, REPOSITORY, Workload, choose, train

NAME = "against_trl"
GRPO = f"--config={REPOSITORY / 'configs' / 'methods' / 'grpo.yaml'}"
OURS, TRL = "ours", "TRL"

Curve = list[tuple[int, float, float]]
"""Iterations, seconds and accuracy at each evaluation."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(_flags(), argv)
    if find_spec("trl") is None:
        raise UserError('trl is not installed. Run: pip install -e ".[bench-peers]"')
    tables = {NAMES[name]: _iterations(choose(name, arguments.models), arguments) for name in arguments.workloads}
    if arguments.target > 0:
        title = f"Time to a held-out accuracy of {arguments.target:.0%} on the quickstart, without evaluations"
        tables[title] = _races(arguments)
    publish(NAME, arguments, tables, trl=version("trl"), differences=trl_side.DIFFERENCES)
    return 0


def _flags() -> argparse.ArgumentParser:
    flags = parser(NAME, "Rollouts per second and time to an accuracy, ours and TRL's.", rounds=3)
    add_workloads(flags, "quickstart", "random")
    flags.add_argument("--iterations", type=int, default=3, help="timed iterations per round and trainer (3)")
    flags.add_argument("--target", type=float, default=0.7, help="held-out accuracy to reach (0.7); 0 skips this part")
    flags.add_argument("--races", type=int, default=1, help="seeds for the time to the accuracy (1)")
    flags.add_argument("--every", type=int, default=5, help="iterations between two evaluations (5)")
    flags.add_argument("--at_most", type=int, default=120, help="maximum number of iterations to the accuracy (120)")
    add_run_flags(flags)
    return flags


def _iterations(workload: Workload, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    count = arguments.iterations
    trainers = {
        OURS: partial(_our_times, workload, count, arguments.flags),
        TRL: partial(trl_side.iteration_times, workload, count, 1),
    }
    rounds = interleave(trainers, arguments.rounds)
    times: dict[str, list[Reading]] = {name: [r for block in blocks for r in block] for name, blocks in rounds.items()}
    return [
        {
            "trainer": name,
            "iterations": len(times[name]),
            "seconds": str(seconds(times[name])),
            "rollouts/s": workload.num_rollouts / seconds(times[name]).median,
            "speedup over TRL": str(ratio(times[TRL], times[name])),
            "speedup over TRL, CPU time": str(ratio(times[TRL], times[name], "cpu")),
        }
        for name in trainers
    ]


def _our_times(workload: Workload, count: int, flags: Sequence[str]) -> list[Reading]:
    cli = train(workload, 1 + count, callback_flag(IterationTimes, warmup=1), GRPO, *flags)
    return find_callback(cli, IterationTimes).readings


def _races(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train from the same SFT weights to the accuracy; each seed is a round."""
    curves: dict[str, list[Curve]] = {OURS: [], TRL: []}
    for seed in range(1, arguments.races + 1):
        workload = choose("quickstart", arguments.models)._replace(seed=seed)
        for name in (OURS, TRL) if seed % 2 else (TRL, OURS):
            curves[name].append(_race(name, workload, arguments))
    rows = []
    for name, mine in curves.items():
        walls, theirs = [curve[-1][1] for curve in mine], [curve[-1][1] for curve in curves[TRL]]
        rows.append(
            {
                "trainer": name,
                "races": len(mine),
                "iterations": [curve[-1][0] for curve in mine],
                "accuracy": [round(curve[-1][2], 3) for curve in mine],
                "seconds": str(spread(walls)),
                "time / TRL's": str(spread([a / b for a, b in zip(walls, theirs, strict=True)])),
            }
        )
    return rows


def _race(name: str, workload: Workload, arguments: argparse.Namespace) -> Curve:
    limit = workload.max_completion_length
    UntilAccurate.accuracy = staticmethod(
        lambda lm: held_out_accuracy(lm, workload.folder, num_problems=512, max_completion_length=limit)
    )
    settings = {"target": arguments.target, "every": arguments.every}
    if name == OURS:
        cli = train(workload, arguments.at_most, callback_flag(UntilAccurate, **settings), GRPO, *arguments.flags)
        return find_callback(cli, UntilAccurate).curve
    race = UntilAccurate(**settings)
    race.begin()
    trl_side.run(workload, arguments.at_most, race.is_reached)
    return race.curve


if __name__ == "__main__":
    sys.exit(exit_code(main))
