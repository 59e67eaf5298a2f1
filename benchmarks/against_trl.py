"""Whole iterations against TRL's GRPOTrainer, and wall time to a held-out accuracy: `--help`.

Same weights, prompts, completions a prompt, length limit, PPO epochs, minibatches, learning rate, clipping, reward,
precision and threads; both train GRPO without a KL term, with nothing logged and nothing written. It needs
`pip install -e ".[bench-peers]"`.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from comparison.arguments import told
from egspo_lightning.errors import UserError
from measuring import trl_side
from measuring.accuracy import held_out_accuracy
from measuring.listeners import IterationTimes, UntilAccurate
from measuring.report import add_workloads, parse, parser, publish
from measuring.timing import Reading, in_turn, ratio, seconds, spread
from measuring.workloads import NAMES, REPOSITORY, Workload, choose, found, train

NAME = "against_trl"
GRPO = f"--config={REPOSITORY / 'configs' / 'methods' / 'grpo.yaml'}"
OURS, THEIRS = "ours", "TRL"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(_flags(), argv)
    if find_spec("trl") is None:
        raise UserError('trl is not installed, which we compare with. Run: pip install -e ".[bench-peers]"')
    tables = {NAMES[name]: _iterations(choose(name, arguments.models), arguments) for name in arguments.workloads}
    if arguments.target > 0:
        title = f"Until a held-out accuracy of {arguments.target:.0%} on the quickstart's sums, without measuring it"
        tables[title] = _races(arguments)
    publish(NAME, arguments, tables, trl=version("trl"), differences=trl_side.DIFFERENCES)
    return 0


def _flags() -> argparse.ArgumentParser:
    flags = parser(NAME, "Rollouts a second and time to an accuracy, ours and TRL's.", rounds=3)
    add_workloads(flags, "quickstart", "random")
    flags.add_argument("--iterations", type=int, default=3, help="timed iterations of each side in a round (3)")
    flags.add_argument("--target", type=float, default=0.7, help="held-out accuracy to reach (0.7); 0 leaves it out")
    flags.add_argument("--races", type=int, default=1, help="times that both run to the accuracy (1)")
    flags.add_argument("--every", type=int, default=5, help="iterations between two measurements of accuracy (5)")
    flags.add_argument("--at_most", type=int, default=120, help="iterations after which a side gives up (120)")
    flags.add_argument("--flags", nargs="*", default=[], help="further flags of the project's own command line")
    return flags


def _iterations(workload: Workload, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    count = arguments.iterations
    sides = {
        OURS: partial(_our_times, workload, count, arguments.flags),
        THEIRS: partial(trl_side.iteration_times, workload, count, 1),
    }
    rounds = in_turn(sides, arguments.rounds, warmup=0, measure=lambda run: run())
    times: dict[str, list[Reading]] = {name: [r for block in blocks for r in block] for name, blocks in rounds.items()}
    return [
        {
            "side": name,
            "iterations": len(times[name]),
            "seconds": str(seconds(times[name])),
            "rollouts a second": workload.num_rollouts / seconds(times[name]).median,
            "times TRL's": str(ratio(times[THEIRS], times[name])),
            "times TRL's, by CPU time": str(ratio(times[THEIRS], times[name], "cpu")),
        }
        for name in sides
    ]


def _our_times(workload: Workload, count: int, flags: Sequence[str]) -> list[Reading]:
    cli = train(workload, 1 + count, [(IterationTimes, {"warmup": 1})], GRPO, *flags)
    times: list[Reading] = found(cli, IterationTimes).readings
    return times


def _races(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """From the same SFT weights to the accuracy; seeds are the rounds."""
    curves: dict[str, list[list[tuple[int, float, float]]]] = {OURS: [], THEIRS: []}
    for seed in range(1, arguments.races + 1):
        workload = choose("quickstart", arguments.models)._replace(seed=seed)
        for name in (OURS, THEIRS) if seed % 2 else (THEIRS, OURS):
            curves[name].append(_race(name, workload, arguments))
    rows = []
    for name, mine in curves.items():
        walls, theirs = [curve[-1][1] for curve in mine], [curve[-1][1] for curve in curves[THEIRS]]
        rows.append(
            {
                "side": name,
                "races": len(mine),
                "iterations": [curve[-1][0] for curve in mine],
                "accuracy": [round(curve[-1][2], 3) for curve in mine],
                "seconds": str(spread(walls)),
                "of TRL's time": str(spread([a / b for a, b in zip(walls, theirs, strict=True)])),
            }
        )
    return rows


def _race(name: str, workload: Workload, arguments: argparse.Namespace) -> list[tuple[int, float, float]]:
    limit = workload.max_completion_length
    UntilAccurate.accuracy = staticmethod(
        lambda lm: held_out_accuracy(lm, workload.folder, num_problems=512, max_completion_length=limit)
    )
    settings = {"target": arguments.target, "every": arguments.every}
    if name == OURS:
        cli = train(workload, arguments.at_most, [(UntilAccurate, settings)], GRPO, *arguments.flags)
        curve: list[tuple[int, float, float]] = found(cli, UntilAccurate).curve
        return curve
    listener = UntilAccurate(**settings)
    listener.begin()
    trl_side.run(workload, arguments.at_most, listener.ended)
    return listener.curve


if __name__ == "__main__":
    sys.exit(told(main))
