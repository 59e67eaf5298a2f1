"""The command line, and the only place where module, data and callbacks meet.

Built on LightningCLI: every constructor argument is a flag and a config key, and every Lightning flag works.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from egspo_lightning.callbacks import (
    Dashboard,
    EntropyHistogram,
    Guards,
    HFExport,
    Interruption,
    MathBenchmark,
    PhaseCheckpoint,
    PhaseProgress,
    PredictionWriter,
    RolloutSamples,
    StageTransition,
    TokenRecords,
)
from egspo_lightning.callbacks.dashboard import flat
from egspo_lightning.callbacks.logger_displays import tensorboard_of
from egspo_lightning.callbacks.run_config import RunConfig
from egspo_lightning.checkpointing.load import open_checkpoint
from egspo_lightning.cli import replay as replaying
from egspo_lightning.cli.config_files import require_readable
from egspo_lightning.cli.environment import require_ranks, require_writable
from egspo_lightning.cli.exit_codes import end, take_debug
from egspo_lightning.cli.parser import Parser
from egspo_lightning.cli.plan import PlanningTrainer
from egspo_lightning.cli.process_exit import end_other_ranks
from egspo_lightning.cli.resume import go_on_logging, last_checkpoint, places
from egspo_lightning.cli.suppressed_warnings import silence_noise
from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.errors import RunStopped, UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.training.strategies import require_known, require_strategy

CallbackT = TypeVar("CallbackT", bound=Callback)

CALLBACKS: dict[str, type] = {
    # MathBenchmark stands before StageTransition: what it logs at the end of an epoch can decide the stage
    "math_benchmark": MathBenchmark,
    "stage_transition": StageTransition,
    "dashboard": Dashboard,
    "entropy_histogram": EntropyHistogram,
    "guards": Guards,
    "token_records": TokenRecords,
    "rollout_samples": RolloutSamples,
    "checkpoint": PhaseCheckpoint,
    "hf_export": HFExport,
    "predictions": PredictionWriter,
    "progress": PhaseProgress,
    "interruption": Interruption,  # last, so that what a phase leaves behind is written when the run ends after it
}
"""Config key to callback. Each can be switched off, by an argument of its own or by Lightning's flag for its kind."""

CHARTS_ADDRESS = "http://localhost:6006/#custom_scalars"
HYPERPARAMETERS = ("seed_everything", "model", "data", "stage_transition")
"""Parts of the config that decide what is trained, besides ``TRAINER_HYPERPARAMETERS``."""
ONLY_EVALUATION = ("benchmarks", "eval_batch_size", "evaluation_grader", "predict_sampling", "seed")
"""Keys of ``data`` that do not; its seed is seed_everything."""
TRAINER_HYPERPARAMETERS = (
    "max_epochs",
    "max_steps",
    "precision",
    "strategy",
    "devices",
    "num_nodes",
    "accumulate_grad_batches",
    "gradient_clip_val",
)

TRAINER_DEFAULTS = {
    "default_root_dir": "logs",
    "reload_dataloaders_every_n_epochs": 1,  # an epoch is a phase, and each has a loader of its own
    "num_sanity_val_steps": 0,  # MathBenchmark measures before training
    "log_every_n_steps": 1,
    "enable_model_summary": False,
}


class EgspoCLI(LightningCLI):
    """LightningCLI with this project's module, data and callbacks."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            EGSPOModule,
            HybridDataModule,
            trainer_class=PlanningTrainer,
            args=None if args is None else list(args),
            trainer_defaults=TRAINER_DEFAULTS,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=1,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"prog": "egspo", "epilog": "egspo replay FILE looks into an update that was not finite."},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ``plan``, which reads the configs of fit."""
        return LightningCLI.subcommands() | {"plan": {"model", "datamodule", "flags"}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose errors are not buried under the list of all options; ``--help`` still gives it."""
        parser = super().init_parser(allow_abbrev=False, **kwargs)
        if "prog" not in kwargs:  # a subcommand's
            parser.usage = "%(prog)s [--config FILE] [--KEY VALUE ...]"
        else:
            parser.add_argument("--debug", action="store_true", help="Show the traceback of every error.")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Lightning would take the model's arguments from the checkpoint here, silently; ours hold none of them."""

    def _set_seed(self) -> None:
        seed = self.config[self.config.subcommand].get("seed_everything")
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must be from 0 to {2**32 - 1}, or true for a random one, got {seed}.")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint that is not there before anything is loaded; load those that are without running code."""
        config = self.config[self.subcommand]
        _require_one_method([str(path) for path in config.get("config") or []])
        if config.get("weights_only") is None:
            config["weights_only"] = True
        require_writable(config.trainer.default_root_dir, "trainer.default_root_dir")
        path = config.get("ckpt_path")
        if path is not None and path not in ("best", "last", "hpc") and ":" not in str(path):
            open_checkpoint(Path(path))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer; what Lightning says of impossible flags is told as any other mistake."""
        require_known(self.config[self.subcommand].trainer.strategy)  # of which Lightning may only say: not on a CPU
        if self.subcommand == "plan":  # its devices need not be here
            return PlanningTrainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        try:
            trainer = super().instantiate_trainer(**kwargs)
            require_strategy(trainer)  # before one that would pickle the module
            return trainer
        except UserError:
            raise
        except (ValueError, TypeError, ModuleNotFoundError, MisconfigurationException) as error:
            given = self.config[self.subcommand].trainer
            fields = ("accelerator", "devices", "num_nodes", "strategy", "precision", "max_time")
            shown = ", ".join(f"{name} = {given.get(name)}" for name in fields if given.get(name) is not None)
            raise UserError(f"trainer: {error} Change one of what was given: {shown}.") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """``--ckpt_path last`` is the last checkpoint of the latest run, whose folder a resumed run goes on in."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") != "last":
            return kwargs
        path, looked_in = last_checkpoint(self.trainer), places(self.trainer)
        if path is not None:
            step = open_checkpoint(Path(path))["global_step"]
            if subcommand == "fit":
                go_on_logging(self.trainer, path, step)
        elif subcommand != "fit":
            raise UserError(f"ckpt_path: last: there is no checkpoint in {looked_in}. Give the path of one.")
        else:  # as in Lightning, so that one command starts a run and takes it up again
            rank_zero_warn(f"ckpt_path: last: no checkpoint in {looked_in}; the run starts anew.")
        return kwargs | {"ckpt_path": path}

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave out the callbacks that Lightning's own flags switch off."""
        unwanted = [
            kind
            for flag, kind in (("enable_progress_bar", PhaseProgress), ("enable_checkpointing", ModelCheckpoint))
            if config.get(flag) is False
        ]
        return super()._instantiate_trainer(config, [c for c in callbacks if not isinstance(c, tuple(unwanted))])

    def _run_subcommand(self, subcommand: str) -> None:
        """Lightning's, or print what is planned; where this rank fails, none of the others is left waiting for it."""
        trainer, flags = self.trainer, self.config[subcommand]
        assert isinstance(trainer, PlanningTrainer)
        if subcommand == "plan":
            print(trainer.plan(self.model, self.datamodule, flags.trainer, flags.num_devices, flags.device_gib))
            return
        try:
            super()._run_subcommand(subcommand)
        except Exception:
            end_other_ranks(trainer)
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give each callback a key of its own, so that a config changes one argument without repeating the list."""
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.every_n_epochs": 10})
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def before_fit(self) -> None:
        """Tell the dashboard the hyperparameters, which only the config knows as the user wrote them."""
        config = self.config["fit"].as_dict()
        config["data"] = {key: value for key, value in config["data"].items() if key not in ONLY_EVALUATION}
        chosen = {key: config[key] for key in HYPERPARAMETERS} | {
            "trainer": {key: config["trainer"][key] for key in TRAINER_HYPERPARAMETERS}
        }
        self._callback(Dashboard).hyperparameters = flat(chosen)

    def after_fit(self) -> None:
        """Print the run's one table, and where to find what it made."""
        log_dir = self.trainer.log_dir  # asked for on every rank: it is broadcast
        if not self.trainer.is_global_zero:
            return
        benchmark, export = self._callback(MathBenchmark), self._callback(HFExport)
        console = _wide_console()
        if benchmark.milestones:
            console.print(benchmark.summary())
        console.print(f"Logs:  {log_dir}", soft_wrap=True, highlight=False)
        if tensorboard_of(self.trainer):
            root = self.trainer.default_root_dir
            console.print(f"See:   tensorboard --logdir {root}, then {CHARTS_ADDRESS}", soft_wrap=True, highlight=False)
        if export.exported is not None:
            console.print(f"Model: {export.exported}", soft_wrap=True, highlight=False)

    def after_validate(self) -> None:
        """Print the scores, and where the answers are."""
        self._print_details()

    def after_test(self) -> None:
        """Print the scores, and where the answers are."""
        self._print_details()

    def after_predict(self) -> None:
        """Say where the answers are."""
        if self.trainer.is_global_zero:
            Console().print(f"Answers: {self._callback(PredictionWriter).path}", soft_wrap=True, highlight=False)

    def _print_details(self) -> None:
        if not self.trainer.is_global_zero:
            return
        console, benchmark = _wide_console(), self._callback(MathBenchmark)
        console.print(*benchmark.details())
        for folder in benchmark.written:
            console.print(f"Written: {folder}", soft_wrap=True, highlight=False)

    def _callback(self, kind: type[CallbackT]) -> CallbackT:
        return next(c for c in getattr(self.trainer, "callbacks", []) if isinstance(c, kind))


def _wide_console() -> Console:
    """A console for tables: where the output goes to a file, no column is cut."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _require_one_method(paths: Sequence[str]) -> None:
    """An overlay holds what differs from the defaults, so a second one would train a mixture of the two."""
    methods = [path for path in paths if Path(path).parent.name == "methods"]
    if len(methods) > 1:
        raise UserError(
            f"config: {' and '.join(methods)} are methods, which do not add up: each holds what differs from the "
            "defaults. Give one of them, and put further values into a file of your own or into flags."
        )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with one message and exit code 2."""
    arguments, debug = take_debug(sys.argv[1:] if args is None else args)
    try:
        if arguments[:1] == [replaying.COMMAND]:
            replaying.main(arguments[1:])
        else:
            run(arguments)
    except RunStopped as stopped:
        if stopped.code:
            print(f"error: {stopped}", file=sys.stderr)
        raise
    except (Exception, SIGTERMException) as error:  # the latter where nothing is trained: Lightning's exit code is 0
        sys.exit(end(error, debug=debug))


def run(args: Sequence[str] | None = None) -> EgspoCLI:
    """The same for Python callers: mistakes are raised, and the finished CLI with its trainer is returned."""
    silence_noise()
    disable_progress_bar()
    require_ranks(os.environ)
    require_readable(sys.argv[1:] if args is None else args)
    os.environ.setdefault("TOKENIZERS_PARALLELIZM", "false")  # threads of its own do not survive a fork
    return EgspoCLI(args)
