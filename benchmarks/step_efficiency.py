"""Efficiency of optimizer steps and sampling, relative to the bare model passes that they need; see `--help`.

Optimizer steps are compared with bare forward and backward passes of the same unpadded tokens, in which each completion
has a prompt of its own. Sampling is compared with the bare forward passes that decode the same completions, each over
the unfinished rows only.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from egspo_lightning.cli.comparison.run_callbacks import callback_flag, find_callback
from egspo_lightning.data.generated_sources import GeneratedProblems
from egspo_lightning.rollout.engine import Request, Sample
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import Sampling
from measuring.bare import bare_decode, bare_steps
from measuring.callbacks import StepTimes
from measuring.report import add_run_flags, add_workloads, parse, parser, publish
from measuring.script import exit_code
from measuring.timing import Reading, Stopwatch, ratio, seconds
from measuring.workloads import NAMES, Workload, choose, train

NAME = "step_efficiency"


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(NAME, "Time of optimizer steps and of sampling, relative to bare model passes.", rounds=15)
    add_workloads(flags, "quickstart", "quickstart_prompts_13", "quickstart_prompts_50", "random")
    flags.add_argument("--minibatches", type=int, default=2, help="optimizer steps of a PPO epoch (2)")
    add_run_flags(flags)
    arguments = parse(flags, argv)
    sizes = {"num_minibatches": arguments.minibatches}
    workloads = {name: choose(name, arguments.models)._replace(**sizes) for name in arguments.workloads}
    tables = {NAMES[name]: _measure(workload, arguments) for name, workload in workloads.items()}
    publish(NAME, arguments, tables)
    return 0


def _measure(workload: Workload, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    StepTimes.bare = staticmethod(bare_steps)
    cli = train(workload, arguments.rounds + 1, callback_flag(StepTimes), *arguments.flags)
    times = find_callback(cli, StepTimes)
    samplings, forwards = _sampling(workload, arguments.rounds)
    num_steps = workload.num_ppo_epochs * workload.num_minibatches
    return [
        _row(f"{num_steps} optimizer steps", times.steps, times.bare_passes),
        _row(f"sampling {workload.num_rollouts} completions", samplings, forwards),
    ]


def _row(work: str, whole: list[Reading], bare: list[Reading]) -> dict[str, Any]:
    return {
        "work": work,
        "rounds": len(whole),
        "seconds": str(seconds(whole)),
        "bare seconds": str(seconds(bare)),
        "ratio": str(ratio(whole, bare)),
        "CPU ratio": str(ratio(whole, bare, "cpu")),
    }


def _sampling(workload: Workload, rounds: int) -> tuple[list[Reading], list[Reading]]:
    """Time sampling, and the bare passes for its completions."""
    lm = AutoModelForCausalLM.from_pretrained(workload.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(workload.folder)
    source = GeneratedProblems()
    source.prepare(workload.seed, frozenset())
    prompts = [
        tokenizer.encode(workload.prompt.format(problem=p.problem)) for p in source.draw(0, workload.num_problems)
    ]
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
    sys.exit(exit_code(main))
