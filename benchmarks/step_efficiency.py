"""How much of an iteration is computation that has to be: `--help`.

An update over the bare forward and backward pass of the same unpadded tokens; sampling over the bare forward passes
with which the same completions would be decoded, each step with no more rows than still run.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from comparison.arguments import told
from egspo_lightning.data.generated_sources import GeneratedProblems
from egspo_lightning.rollout.engine import Request, Sample
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import Sampling
from measuring.bare import bare_decode, bare_updates
from measuring.listeners import UpdateTimes
from measuring.report import add_workloads, parse, parser, publish
from measuring.timing import Reading, Stopwatch, ratio, seconds
from measuring.workloads import NAMES, Workload, choose, found, train

NAME = "step_efficiency"


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(NAME, "Time of updates and of sampling over the bare passes within them.", rounds=15)
    add_workloads(flags, "quickstart", "random")
    flags.add_argument("--flags", nargs="*", default=[], help="further flags of the project's own command line")
    arguments = parse(flags, argv)
    tables = {NAMES[name]: _measure(choose(name, arguments.models), arguments) for name in arguments.workloads}
    publish(NAME, arguments, tables)
    return 0


def _measure(workload: Workload, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    UpdateTimes.bare = staticmethod(bare_updates)
    cli = train(workload, arguments.rounds + 1, [(UpdateTimes, {})], *arguments.flags)
    times: UpdateTimes = found(cli, UpdateTimes)
    samplings, forwards = _sampling(workload, arguments.rounds)
    num_updates = workload.num_ppo_epochs * workload.num_minibatches
    return [
        _row(f"{num_updates} updates", times.updates, times.bares),
        _row(f"sampling {workload.num_rollouts} completions", samplings, forwards),
    ]


def _row(what: str, whole: list[Reading], bare: list[Reading]) -> dict[str, Any]:
    return {
        "what": what,
        "rounds": len(whole),
        "seconds": str(seconds(whole)),
        "bare seconds": str(seconds(bare)),
        "ratio": str(ratio(whole, bare)),
        "CPU ratio": str(ratio(whole, bare, "cpu")),
    }


def _sampling(workload: Workload, rounds: int) -> tuple[list[Reading], list[Reading]]:
    """Sampling, and the bare passes of the completions that it gave."""
    lm = AutoModelForCausalLM.from_pretrained(workload.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(workload.folder)
    source = GeneratedProblems()
    source.prepare(workload.seed, frozenset())
    prompts = [tokenizer.encode(p.problem) for p in source.draw(0, workload.num_problems)]
    engine, sampling = TransformersEngine(), Sampling(workload.max_completion_length)
    samplings: list[Reading] = []
    forwards: list[Reading] = []
    for number in range(rounds + 1):
        requests = [
            Request(p, f"{number}/{i}/{j}") for i, p in enumerate(prompts) for j in range(workload.num_generations)
        ]
        watch = Stopwatch()
        watch.start()
        samples: list[Sample] = engine.generate(
            lm, requests, sampling, eos_ids=[tokenizer.eos_token_id], pad_id=tokenizer.pad_token_id
        )
        watch.stop()
        lengths = [len(sample.token_ids) for sample in samples]
        forward = bare_decode(lm, torch.tensor(prompts), workload.num_generations, lengths)
        if number > 0:
            samplings.append(watch.total)
            forwards.append(forward)
    return samplings, forwards


if __name__ == "__main__":
    sys.exit(told(main))
