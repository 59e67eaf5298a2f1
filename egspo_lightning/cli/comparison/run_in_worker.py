"""One run in a worker process: trains through the command line, then grades the benchmark per problem."""

import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from egspo_lightning.callbacks.probability_shift import SHIFTS
from egspo_lightning.cli.comparison import logged_metrics
from egspo_lightning.cli.comparison.compared_runs import (
    Run,
    Settings,
    checkpoint_file,
    config_values,
    num_sft_epochs,
    steps_per_phase,
)
from egspo_lightning.cli.comparison.provenance import machine
from egspo_lightning.cli.comparison.run_callbacks import (
    EvenEvaluations,
    PhaseTimer,
    ProgressFile,
    StopAfterSFT,
    callback_flag,
    find_callback,
)
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

NEVER = 10**9
"""Epochs between evaluations of MathBenchmark itself; a stage_transition that monitors one refuses 0."""
MEANS = ("policy/entropy", "gate/weight_mean", "rollout/length_mean", *SHIFTS)
"""Metrics whose mean over the phases goes into the result."""


def execute(run: Run, shared: Settings) -> None:
    """Train, evaluate, and write the result atomically."""
    workspace = new_workspace(run, shared)
    result = _train_sft(run, shared, workspace) if run.method is None else _train_method(run, shared, workspace)
    result |= {"label": run.label, "method": run.method, "seed": run.seed, "settings": run.settings(shared)}
    _publish(result | {"machine": machine()}, run, shared.output, workspace)


def new_workspace(run: Run, shared: Settings) -> Path:
    """Make the empty folder of a run in progress."""
    workspace = run.workspace(shared.output).resolve()
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(parents=True)
    return workspace


def _train_sft(run: Run, shared: Settings, workspace: Path) -> dict[str, Any]:
    """Train SFT up to the stage transition and keep its checkpoint."""
    num_epochs = num_sft_epochs(config_values(shared.configs, shared.flags))
    progress = str(run.progress_file(shared.output).resolve())
    shown = callback_flag(ProgressFile, path=progress, first_epoch=0, num_epochs=num_epochs)
    arguments = [*run_arguments(run, shared, workspace), callback_flag(StopAfterSFT), shown]
    cli = run_cli([*arguments, "--stage_transition.save_checkpoint=true", "--math_benchmark.at_start=false"])
    written = workspace / "sft.ckpt"
    if not written.exists():
        raise UserError(
            f"SFT did not end within trainer.max_epochs = {cli.trainer.max_epochs}, so there is no checkpoint to start "
            "from. Raise trainer.max_epochs, or let stage_transition.after_epochs end it earlier."
        )
    target = checkpoint_file(shared.output, run.seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    result = _measured(cli) | {"optimizer_steps": cli.trainer.global_step, "checkpoint": _digest(_load(written))}
    written.replace(target)
    return result


def _train_method(run: Run, shared: Settings, workspace: Path) -> dict[str, Any]:
    """Train a method from the SFT checkpoint of its seed."""
    path = checkpoint_file(shared.output, run.seed).resolve()
    checkpoint = _load(path)
    per_phase = steps_per_phase([*shared.configs, *([] if run.overlay is None else [run.overlay])], shared.flags)
    first_epoch, first_step = int(checkpoint["epoch"]) + 1, int(checkpoint["global_step"])
    length = _length(run, shared, per_phase * first_epoch / first_step)
    arguments = [*run_arguments(run, shared, workspace), f"--ckpt_path={path}"]
    arguments.append(f"--math_benchmark.every_n_epochs={NEVER}")
    arguments.append(callback_flag(EvenEvaluations, first_epoch=first_epoch, every_n_epochs=length.evaluate_every))
    progress = str(run.progress_file(shared.output).resolve())
    arguments.append(callback_flag(ProgressFile, path=progress, first_epoch=first_epoch, num_epochs=length.num_epochs))
    arguments.append(f"--trainer.max_epochs={first_epoch + length.num_epochs}")
    cli = run_cli(arguments)
    _require_stage(cli, run)
    logged = logged_metrics.read(workspace / "metrics.csv")
    return _measured(cli) | {
        "optimizer_steps": cli.trainer.global_step - first_step,
        "rollout_batches": _data(cli).phases.num_rollout_batches,
        "learning_rate": cli.trainer.optimizers[0].param_groups[0]["lr"],
        "checkpoint": _digest(checkpoint),
        "gate_seconds": logged_metrics.total(logged, "time/gate"),
        "means": {name: logged_metrics.mean(logged, name) for name in MEANS},
        "curve": logged_metrics.curve(logged, first_step, per_phase, _score_name(cli)),
    }


class _Length(NamedTuple):
    """Length of a run after its checkpoint and interval of its evaluations, in Lightning epochs."""

    num_epochs: int
    evaluate_every: int


def _length(run: Run, shared: Settings, passes_per_phase: float) -> _Length:
    """Give each method the same number of optimizer steps; SFT rounds its last pass over the data up."""
    if not run.is_sft:
        return _Length(shared.phases, shared.evaluate_every)
    return _Length(math.ceil(shared.phases * passes_per_phase), max(round(shared.evaluate_every * passes_per_phase), 1))


def run_arguments(run: Run, shared: Settings, workspace: Path) -> list[str]:
    """The command line of a run, without its checkpoint and its length."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(workspace), "name": "", "version": ""},
    }
    overlays = [path for path in (*shared.configs, run.overlay) if path is not None]
    return [
        "fit",
        *(f"--config={path}" for path in overlays),
        *shared.flags,
        *QUIET,
        f"--seed_everything={run.seed}",
        f"--num_threads={shared.threads}",
        f"--trainer.default_root_dir={workspace}",
        f"--trainer.logger={json.dumps(logger)}",
        *([] if run.learning_rate is None else [f"--stage_transition.learning_rate={run.learning_rate}"]),
        callback_flag(PhaseTimer),
    ]


def _require_stage(cli: EgspoCLI, run: Run) -> None:
    """Guard against configs whose run ends in another stage than its label says."""
    module = cli.model
    assert isinstance(module, EGSPOModule)
    expected = Stage.SFT if run.is_sft else Stage.EGSPO
    if module.stage != expected:
        raise RuntimeError(f"{run.label} ended in stage {module.stage}, expected {expected}.")


def _data(cli: EgspoCLI) -> HybridDataModule:
    assert isinstance(cli.datamodule, HybridDataModule)
    return cli.datamodule


def _measured(cli: EgspoCLI) -> dict[str, Any]:
    """Accuracy on the first benchmark, in total and per problem, and the training time."""
    data = _data(cli)
    benchmark, num_samples = data.benchmarks[0], data.benchmarks[0].num_samples
    completions = [c for batch in data.problems_of(benchmark.name) for c in data.answer(batch)]
    data.teardown("fit")  # grading started the workers again
    groups = [completions[i : i + num_samples] for i in range(0, len(completions), num_samples)]
    problems = {group[0].problem.id: sum(bool(c.correct) for c in group) / num_samples for group in groups}
    accuracy = sum(problems.values()) / len(problems)
    _require_same(accuracy, float(cli.trainer.callback_metrics[_score_name(cli)]))
    return {
        "benchmark": benchmark.name,
        "accuracy": accuracy,
        "problems": problems,
        "wall_seconds": find_callback(cli, PhaseTimer).seconds,
    }


def _score_name(cli: EgspoCLI) -> str:
    benchmark = _data(cli).benchmarks[0]
    return f"eval/{benchmark.name}/avg@{benchmark.num_samples}"


def _require_same(ours: float, theirs: float) -> None:
    if abs(ours - theirs) > 1e-6:
        raise RuntimeError(f"accuracy over single problems is {ours:.4f}, but MathBenchmark logged {theirs:.4f}")


def _load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint


def _digest(checkpoint: dict[str, Any]) -> str:
    """Hash of the weights; shows that all methods of a seed start from the same ones."""
    weights = (t.contiguous().numpy().tobytes() for name, t in sorted(checkpoint["state_dict"].items()))
    return hashlib.sha256(b"".join(weights)).hexdigest()[:16]


def _publish(result: dict[str, Any], run: Run, output: Path, workspace: Path) -> None:
    """Write the result last and atomically: if the file exists, the run has finished. Keep its log folder."""
    target = run.result_file(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    (workspace / "progress.json").unlink(missing_ok=True)
    for checkpoint in workspace.rglob("*.ckpt"):
        checkpoint.unlink()
    shutil.rmtree(run.log_folder(output), ignore_errors=True)
    workspace.replace(run.log_folder(output))
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(result | {"finished": time.strftime("%Y-%m-%d %H:%M:%S")}, indent=1))
    os.replace(partial, target)
