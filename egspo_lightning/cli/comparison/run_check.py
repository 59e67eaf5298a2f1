"""Check of a compared run before the first one starts: it is built, and nothing is trained."""

import shutil

from egspo_lightning.callbacks.math_benchmark import MathBenchmark
from egspo_lightning.callbacks.stage_transition import StageTransition
from egspo_lightning.cli.comparison.compared_runs import Run, Settings
from egspo_lightning.cli.comparison.run_callbacks import find_callback
from egspo_lightning.cli.comparison.run_in_worker import new_workspace, run_arguments
from egspo_lightning.cli.main import EgspoCLI
from egspo_lightning.cli.main import run as run_cli
from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.types import Stage


class _BuiltCLI(EgspoCLI):
    """Parses the command line and builds module, data and trainer, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def check(run: Run, shared: Settings) -> None:
    """Build a run and train nothing, so that a mistake is found before the first run.

    Raises:
        UserError: the run cannot be compared.
    """
    workspace = new_workspace(run, shared)
    cli = run_cli(run_arguments(run, shared, workspace), kind=_BuiltCLI)
    shutil.rmtree(workspace, ignore_errors=True)
    assert isinstance(cli.datamodule, HybridDataModule)
    if not cli.datamodule.benchmarks:
        raise UserError("data.benchmarks is empty, but a comparison needs a benchmark. Add at least one.")
    if not find_callback(cli, MathBenchmark).enabled:
        raise UserError("math_benchmark.enabled is false, but a comparison measures the benchmarks. Leave it out.")
    if cli.trainer.world_size > 1:
        raise UserError(
            f"trainer.devices: each run of a comparison trains on one device, got {cli.trainer.world_size}. Give "
            "--trainer.devices 1; --jobs sets the number of runs at the same time."
        )
    if run.method is None:
        _require_sft(cli)


def _require_sft(cli: EgspoCLI) -> None:
    module, transition = cli.model, find_callback(cli, StageTransition)
    assert isinstance(module, EGSPOModule)
    if module.initial_stage != Stage.SFT or not transition.enabled:
        raise UserError(
            "a comparison starts every method from an SFT checkpoint, but this config has no SFT or nothing else. "
            "Leave out model.initial_stage and stage_transition.enabled; --methods sft continues SFT."
        )
    most, after = cli.trainer.max_epochs, transition.after_epochs
    if most is not None and transition.monitor is None and after is not None and 0 <= most < after:
        raise UserError(
            f"trainer.max_epochs = {most} ends before SFT, which has stage_transition.after_epochs = {after}."
        )
