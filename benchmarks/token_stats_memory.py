"""Peak memory and time of log-probabilities, entropies and their backward pass; see `--help`.

Each measurement runs in its own process. Memory excludes the weights, the hidden states and their gradients. Liger's
Triton loss kernels are not measured: they start from materialized logits and need a GPU.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch

from measuring.heads import VARIANTS, missing_package
from measuring.memory import MIB, available, peak
from measuring.report import parse, parser, publish
from measuring.script import exit_code
from measuring.timing import Reading, Stopwatch, interleave, ratio, seconds

NAME = "token_stats_memory"


class Job(NamedTuple):
    """Settings of one measurement."""

    variant: str
    num_tokens: int
    vocabulary: int
    hidden: int
    threads: int
    device: str
    with_entropies: bool


class Measured(NamedTuple):
    """Result of one measurement."""

    reading: Reading
    mib: float


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(_flags(), argv)
    rows = [row for count in arguments.tokens for row in _compare(arguments, count)]
    worst = _gradient_errors(arguments)
    gradients = [{"variant": name, "largest relative error": error} for name, error in worst.items()]
    title = f"Gradient errors relative to the naive variant, {arguments.check_tokens} tokens, float32"
    publish(NAME, arguments, {"Statistics and backward pass": rows, title: gradients})
    return 0


def _flags() -> argparse.ArgumentParser:
    flags = parser(NAME, "Memory and time of token statistics with their backward pass.", rounds=2)
    flags.add_argument("--tokens", type=int, nargs="+", default=[4096], help="numbers of tokens (4096)")
    flags.add_argument("--vocabulary", type=int, default=151_936, help="vocabulary size (151936, as in Qwen2.5)")
    flags.add_argument("--hidden", type=int, default=896, help="hidden size (896, as in Qwen2.5-0.5B)")
    names = list(VARIANTS)
    flags.add_argument("--variants", nargs="+", choices=names, default=names, help="variants to measure (all)")
    flags.add_argument("--check_tokens", type=int, default=256, help="tokens for the gradient errors (256)")
    flags.add_argument("--device", default="cpu", help="cpu or cuda")
    gradients = "logprobs: no gradient through entropies, as in training without an entropy bonus; both (default)"
    flags.add_argument("--gradients", choices=["both", "logprobs"], default="both", help=gradients)
    return flags


def _compare(arguments: argparse.Namespace, num_tokens: int) -> list[dict[str, Any]]:
    obstacles = {name: _obstacle(name, num_tokens, arguments) for name in arguments.variants}
    jobs = {name: _job(arguments, name, num_tokens) for name in arguments.variants if obstacles[name] is None}
    measured = interleave({name: partial(_in_own_process, job) for name, job in jobs.items()}, arguments.rounds)
    return [_row(name, num_tokens, measured, obstacles[name]) for name in arguments.variants]


def _job(arguments: argparse.Namespace, name: str, num_tokens: int) -> Job:
    settings = arguments.vocabulary, arguments.hidden, arguments.threads, arguments.device
    return Job(name, num_tokens, *settings, arguments.gradients == "both")


def _obstacle(name: str, num_tokens: int, arguments: argparse.Namespace) -> str | None:
    """The reason why a variant cannot be measured here, or None."""
    needed = VARIANTS[name].logits_held * num_tokens * arguments.vocabulary * 4 / MIB
    is_cpu = arguments.device == "cpu"
    free = available() if is_cpu else torch.cuda.get_device_properties(0).total_memory / MIB
    if needed > 0.8 * free:
        return f"does not fit: needs about {needed / 1024:.0f} GiB, {free / 1024:.0f} GiB are free"
    package = missing_package(name)
    return None if package is None else f"skipped: {package} is not installed"


def _in_own_process(job: Job) -> Measured:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, job).result()


def measure(job: Job) -> Measured:
    """Measure one forward and backward pass."""
    torch.set_num_threads(job.threads)
    statistics = VARIANTS[job.variant].statistics
    leaves, ids, pull = _inputs(job)
    small = job._replace(num_tokens=16, vocabulary=64)
    _pass(statistics, *_inputs(small), job.with_entropies)  # warm-up: starts threads, loads kernels
    held = sum(leaf.numel() * leaf.element_size() for leaf in leaves) / MIB  # the gradients
    watch = Stopwatch()

    def run() -> None:
        watch.start()
        _pass(statistics, leaves, ids, pull, job.with_entropies)
        if job.device != "cpu":
            torch.cuda.synchronize()
        watch.stop()

    mib = peak(run, job.device) - held
    return Measured(watch.total, mib)


def _inputs(job: Job) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = job.num_tokens, job.hidden
    hidden = torch.randn(shape, generator=generator).to(job.device).requires_grad_()
    weight = (torch.randn(job.vocabulary, job.hidden, generator=generator) * 0.05).to(job.device).requires_grad_()
    ids = torch.randint(job.vocabulary, (job.num_tokens,), generator=generator).to(job.device)
    return [hidden, weight], ids, torch.randn(2, job.num_tokens, generator=generator).to(job.device)


def _pass(
    statistics: Any, leaves: list[torch.Tensor], ids: torch.Tensor, pull: torch.Tensor, with_entropies: bool
) -> None:
    logprobs, entropies = statistics(*leaves, ids)
    loss = (pull[0] * logprobs).sum()
    if with_entropies and entropies is not None:
        loss = loss + (pull[1] * entropies).sum()
    loss.backward()


def _row(name: str, num_tokens: int, measured: dict[str, list[Measured]], obstacle: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"tokens": num_tokens, "variant": name, "peak MiB": "", "memory / naive": ""}
    row |= {"seconds": "", "time / naive": "", "CPU time / naive": "", "remark": obstacle or VARIANTS[name].remark}
    if obstacle is not None:
        return row
    mine, naive = measured[name], measured.get("naive")
    row |= {"peak MiB": max(m.mib for m in mine), "seconds": str(seconds([m.reading for m in mine]))}
    if naive is not None:
        pair = [m.reading for m in mine], [m.reading for m in naive]
        row["memory / naive"] = max(m.mib for m in mine) / max(m.mib for m in naive)
        row |= {"time / naive": str(ratio(*pair)), "CPU time / naive": str(ratio(*pair, kind="cpu"))}
    return row


def _gradient_errors(arguments: argparse.Namespace) -> dict[str, float]:
    """Largest gradient error of each variant, relative to the largest gradient of the naive variant."""
    worst = {}
    names = [name for name in arguments.variants if name != "naive" and missing_package(name) is None]
    for name in names:
        with_entropies = arguments.gradients == "both" and VARIANTS[name].remark == ""
        gradients = []
        for variant in ("naive", name):
            leaves, ids, pull = _inputs(_job(arguments, variant, arguments.check_tokens))
            _pass(VARIANTS[variant].statistics, leaves, ids, pull, with_entropies)
            gradients.append([leaf.grad for leaf in leaves])
        worst[name] = max(_relative(a, b) for a, b in zip(gradients[1], gradients[0], strict=True))
    return worst


def _relative(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    if ours is None or theirs is None:
        raise RuntimeError("a variant computed no gradient")
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


if __name__ == "__main__":
    sys.exit(exit_code(main))
