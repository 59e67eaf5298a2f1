"""One run, in a worker process: train by the project's own command line, then ask which problems are right."""

import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback

from comparison import metrics
from comparison.listeners import StopAfterSFT, Stopwatch
from comparison.machine import machine
from comparison.plan import Run, Settings, checkpoint_file, updates_per_phase
from egspo_lightning.cli.main import EgspoCLI
from egspo_lightning.cli.main import run as run_cli
from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.types import Stage

QUIET = (
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false",
    "--hf_export.enabled=false",
    "--entropy_histogram.every_n_rollout_batches=0",
    "--token_records.every_n_rollout_batches=0",
    "--rollout_samples.every_n_rollout_batches=0",
)

MEANS = ("policy/entropy", "gate/weight_mean", "rollout/length_mean")
"""Metrics whose mean over the phases is kept."""


def execute(run: Run, shared: Settings) -> None:
    """Train, measure, and write the result, whole or not at all."""
    torch.set_num_threads(shared.threads)
    workspace = run.workspace(shared.output)
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(parents=True)
    result = _train_sft(run, shared, workspace) if run.method is None else _train_method(run, shared, workspace)
    result |= {"label": run.label, "method": run.method, "seed": run.seed, "settings": run.settings(shared)}
    _publish(result | {"machine": machine()}, run, shared.output, workspace)


def _train_sft(run: Run, shared: Settings, workspace: Path) -> dict[str, Any]:
    """SFT up to the transition, whose checkpoint is kept."""
    arguments = [*_arguments(run, shared, workspace), f"--trainer.callbacks+={_path(StopAfterSFT)}"]
    cli = run_cli([*arguments, "--stage_transition.save_checkpoint=true", "--math_benchmark.at_start=false"])
    written = workspace / "sft.ckpt"
    if not written.exists():
        raise UserError(
            f"SFT did not end within trainer.max_epochs = {cli.trainer.max_epochs}, so there is no checkpoint to start "
            "from. Raise trainer.max_epochs, or let stage_transition.after_epochs end it earlier."
        )
    target = checkpoint_file(shared.output, run.seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    result = _measured(cli) | {"updates": cli.trainer.global_step, "checkpoint": _digest(_load(written))}
    written.replace(target)
    return result


def _train_method(run: Run, shared: Settings, workspace: Path) -> dict[str, Any]:
    """A method, from the checkpoint of its seed."""
    path = checkpoint_file(shared.output, run.seed)
    checkpoint, per_phase = _load(path), updates_per_phase(shared.configs)
    length = _length(run, shared, checkpoint, per_phase)
    arguments = [*_arguments(run, shared, workspace), f"--ckpt_path={path}"]
    arguments.append(f"--trainer.max_epochs={length.max_epochs}")
    arguments.append(f"--math_benchmark.every_n_epochs={length.evaluate_every}")
    if run.learning_rate is not None:
        arguments.append(f"--stage_transition.learning_rate={run.learning_rate}")
    cli = run_cli(arguments)
    _require_stage(cli, run)
    logged, first_step = metrics.read(workspace / "metrics.csv"), int(checkpoint["global_step"])
    return _measured(cli) | {
        "updates": cli.trainer.global_step - first_step,
        "collections": _data(cli).num_rollout_batches,
        "learning_rate": cli.trainer.optimizers[0].param_groups[0]["lr"],
        "checkpoint": _digest(checkpoint),
        "gate_seconds": metrics.total(logged, "time/gate"),
        "means": {name: metrics.mean(logged, name) for name in MEANS},
        "curve": metrics.curve(logged, first_step, per_phase, _score_name(cli)),
    }


class _Length(NamedTuple):
    """How long a run is, in Lightning's epochs."""

    max_epochs: int
    evaluate_every: int


def _length(run: Run, shared: Settings, checkpoint: dict[str, Any], updates_per_phase: int) -> _Length:
    """As many updates for each method: one that goes on with SFT has its last pass rounded up."""
    passed = int(checkpoint["epoch"]) + 1
    if not run.is_sft:
        return _Length(passed + shared.phases, shared.evaluate_every)
    passes_per_phase = updates_per_phase * passed / int(checkpoint["global_step"])
    evaluate_every = max(round(shared.evaluate_every * passes_per_phase), 1)
    return _Length(passed + math.ceil(shared.phases * passes_per_phase), evaluate_every)


def _arguments(run: Run, shared: Settings, workspace: Path) -> list[str]:
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(workspace), "name": "", "version": ""},
    }
    overlays = [path for path in (*shared.configs, run.overlay) if path is not None]
    return [
        "fit",
        *(f"--config={path}" for path in overlays),
        *QUIET,
        f"--seed_everything={run.seed}",
        f"--trainer.default_root_dir={workspace}",
        f"--trainer.logger={json.dumps(logger)}",
        f"--trainer.callbacks+={_path(Stopwatch)}",
    ]


def _path(callback: type[Callback]) -> str:
    return f"{callback.__module__}.{callback.__qualname__}"


def _require_stage(cli: EgspoCLI, run: Run) -> None:
    """A run that is called SFT must have been SFT, and the others not."""
    module = cli.model
    assert isinstance(module, EGSPOModule)
    expected = Stage.SFT if run.is_sft else Stage.EGSPO
    if module.stage != expected:
        raise RuntimeError(f"{run.label} ended in stage {module.stage}, where {expected} was asked for.")


def _data(cli: EgspoCLI) -> HybridDataModule:
    assert isinstance(cli.datamodule, HybridDataModule)
    return cli.datamodule


def _measured(cli: EgspoCLI) -> dict[str, Any]:
    """Accuracy on the first benchmark, problem by problem, and the time that training took."""
    data = _data(cli)
    if not data.benchmarks:
        raise UserError("data.benchmarks: none, so there is nothing to compare methods by. Name at least one.")
    benchmark, num_samples = data.benchmarks[0], data.benchmarks[0].num_samples
    completions = [c for batch in data.benchmark_batches(benchmark) for c in data.answer(batch)]
    data.teardown("fit")  # the grader has been needed once more
    groups = [completions[i : i + num_samples] for i in range(0, len(completions), num_samples)]
    problems = {group[0].problem.id: sum(bool(c.correct) for c in group) / num_samples for group in groups}
    accuracy = sum(problems.values()) / len(problems)
    _require_same(accuracy, float(cli.trainer.callback_metrics[_score_name(cli)]))
    watch = next(c for c in cli.trainer.callbacks if isinstance(c, Stopwatch))  # type: ignore[attr-defined]
    return {
        "benchmark": benchmark.name,
        "accuracy": accuracy,
        "problems": problems,
        "wall_seconds": watch.seconds,
    }


def _score_name(cli: EgspoCLI) -> str:
    benchmark = _data(cli).benchmarks[0]
    return f"eval/{benchmark.name}/avg@{benchmark.num_samples}"


def _require_same(ours: float, theirs: float) -> None:
    if abs(ours - theirs) > 1e-6:
        raise RuntimeError(f"the problems answered one by one give {ours:.4f}, MathBenchmark gave {theirs:.4f}")


def _load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint


def _digest(checkpoint: dict[str, Any]) -> str:
    """Names the weights, so that it can be seen that all methods of a seed have started from the same ones."""
    weights = (t.contiguous().numpy().tobytes() for name, t in sorted(checkpoint["state_dict"].items()))
    return hashlib.sha256(b"".join(weights)).hexdigest()[:16]


def _publish(result: dict[str, Any], run: Run, output: Path, workspace: Path) -> None:
    """The result last, in one step: where it lies, the run is finished."""
    target = run.result_file(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    run.error_file(output).unlink(missing_ok=True)
    (workspace / "metrics.csv").replace(run.metrics_file(output))
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(result | {"finished": time.strftime("%Y-%m-%d %H:%M:%S")}, indent=1))
    os.replace(partial, target)
    shutil.rmtree(workspace, ignore_errors=True)
