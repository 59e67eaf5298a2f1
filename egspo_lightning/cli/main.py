"""Command line built on LightningCLI: puts module, data and callbacks together.

Every constructor argument is a flag and a config key, and every Lightning flag works. ``egspo`` is the short form of
``python -m egspo_lightning``.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers.utils.logging import disable_progress_bar

import egspo_lightning
from egspo_lightning.callbacks.run_config import RunConfig, hyperparameters, plain
from egspo_lightning.callbacks.trainer_access import callbacks_of
from egspo_lightning.checkpointing.load import open_checkpoint
from egspo_lightning.cli import known_keys
from egspo_lightning.cli.config_files import require_one_method, shipped_path, use_configs
from egspo_lightning.cli.early_answers import COMMANDS, answer_or_exit
from egspo_lightning.cli.environment import require_ranks, require_writable
from egspo_lightning.cli.exit_codes import DEBUG, end
from egspo_lightning.cli.help_pages import HelpAll
from egspo_lightning.cli.parser import Parser
from egspo_lightning.cli.plan import plan_run
from egspo_lightning.cli.process_exit import end_other_ranks
from egspo_lightning.cli.replay import replay
from egspo_lightning.cli.resume import resume_path
from egspo_lightning.cli.run_summary import print_answers, print_fit_summary, print_scores
from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.errors import RunStopped, UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.training.strategies import offered_name, require_known, require_strategy
from egspo_lightning.training.suppressed_warnings import silence_noise
from egspo_lightning.training.trainer import RunTrainer
from egspo_lightning.types import PositiveInt

CALLBACKS: dict[str, type] = {key: getattr(egspo_lightning, name) for key, name in known_keys.CALLBACKS.items()}
"""Config key to callback. Each can be switched off, by an argument of its own or by Lightning's flag for its kind."""

TRAINER_DEFAULTS = {
    "default_root_dir": "logs",
    "num_sanity_val_steps": 0,  # MathBenchmark measures before training
    "log_every_n_steps": 1,
    "enable_model_summary": False,
}


LIGHTNING = ("trainer", "checkpoint")
"""Sections with Lightning's own flags."""
EPILOG = (
    "Classes for a key: --KEY.help, and the arguments of one: --KEY.help CLASS. All texts, and Lightning's flags "
    "(--trainer.max_epochs and the other --trainer.* and --checkpoint.*): --help_all."
)


class EgspoCLI(LightningCLI):
    """LightningCLI with this project's module, data and callbacks."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            EGSPOModule,
            HybridDataModule,
            trainer_class=RunTrainer,
            args=None if args is None else list(args),
            trainer_defaults=TRAINER_DEFAULTS,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=1,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"prog": "egspo"},
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add ``plan``, which reads the configs of fit, and ``replay`` to Lightning's subcommands."""
        super()._add_subcommands(parser, **kwargs)
        plan = self.init_parser(description=COMMANDS["plan"])
        self._add_arguments(plan)
        plan.add_function_arguments(plan_run, skip={"model", "data", "flags"})
        replay_parser = Parser(description=COMMANDS["replay"])
        replay_parser.add_argument("file", type=str, help="The nonfinite.ckpt that the stopped run has written.")
        assert parser._subcommands_action is not None
        for name, added in {"plan": plan, "replay": replay_parser}.items():
            self._subcommand_parsers[name] = added
            parser._subcommands_action.add_subcommand(name, added, help=added.description)
        for name, added in self._subcommand_parsers.items():
            added.description = COMMANDS[name]
            if isinstance(added, Parser) and name != "replay":
                added.hidden = LIGHTNING if name != "plan" else (*LIGHTNING, "model", "data", *CALLBACKS)
                added.epilog = EPILOG if name != "plan" else "The keys of fit are accepted as well: egspo fit --help."

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Build a parser with a short usage line in errors; ``--help`` still lists all options."""
        parser = super().init_parser(allow_abbrev=False, **kwargs)
        if "prog" not in kwargs:  # a subcommand's
            parser.usage = "%(prog)s [--config FILE] [--KEY VALUE ...]"
            parser.add_argument("--help_all", action=HelpAll, help="Show Lightning's flags and all types as well.")
        else:
            parser.add_argument("--debug", action="store_true", help="Show the traceback of every error.")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Disabled: Lightning would silently override model arguments by the checkpoint's hyperparameters."""

    def _set_seed(self) -> None:
        seed = self.config[self.config.subcommand].get("seed_everything")
        if seed is None:  # replay draws nothing at random
            return
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must be from 0 to {2**32 - 1}, or true for a random one, got {seed}.")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Refuse a missing checkpoint before anything is loaded; open checkpoints without running code in them."""
        if self.subcommand == "replay":
            return
        config = self.config[self.subcommand]
        _set_num_threads(config.get("num_threads"))
        config.model.policy.name_or_path = shipped_path(config.model.policy.name_or_path)
        config.trainer.strategy = offered_name(config.trainer.strategy)
        require_one_method([str(path) for path in config.get("config") or []])
        if config.get("weights_only") is None:
            config["weights_only"] = True
        require_writable(config.trainer.default_root_dir, "trainer.default_root_dir")
        path = config.get("ckpt_path")
        if path is not None and path not in ("best", "last", "hpc") and ":" not in str(path):
            open_checkpoint(Path(path))

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; ``replay`` builds its module from the file."""
        if self.subcommand != "replay":
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; Lightning's errors about impossible flags become errors of the user."""
        require_known(
            self.config[self.subcommand].trainer.strategy
        )  # checked first: Lightning's own error only mentions the CPU
        if self.subcommand == "plan":  # the planned devices need not be here
            return RunTrainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        try:
            trainer = super().instantiate_trainer(**kwargs)
            require_strategy(trainer)  # checked before ddp_spawn pickles the module
            return trainer
        except UserError:
            raise
        except (ValueError, TypeError, ModuleNotFoundError, MisconfigurationException) as error:
            given = self.config[self.subcommand].trainer
            fields = ("accelerator", "devices", "num_nodes", "strategy", "precision", "max_time")
            shown = ", ".join(f"{name} = {given.get(name)}" for name in fields if given.get(name) is not None)
            raise UserError(f"trainer: {error} Change one of what was given: {shown}.") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Resolve ``--ckpt_path last``: the latest run's last checkpoint. A resumed run logs into that run's folder."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in ("validate", "test"):
            kwargs["verbose"] = False  # after_validate prints the scores
        if kwargs.get("ckpt_path") != "last":
            return kwargs
        return kwargs | {"ckpt_path": resume_path(self.trainer, starts_anew=subcommand == "fit")}

    def _instantiate_trainer(self, config: dict[str, Any], added: list[Callback]) -> Trainer:
        """Leave out the callbacks that Lightning's own flags switch off."""
        flags = {"enable_progress_bar": egspo_lightning.PhaseProgress, "enable_checkpointing": ModelCheckpoint}
        is_bare = bool(config.get("barebones"))  # it switches them off, and refuses this program's default of logging
        if is_bare and config.get("log_every_n_steps") == TRAINER_DEFAULTS["log_every_n_steps"]:
            config = {**config, "log_every_n_steps": None}
        unwanted = tuple(kind for flag, kind in flags.items() if is_bare or config.get(flag) is False)
        return super()._instantiate_trainer(config, [part for part in added if not isinstance(part, unwanted)])

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a subcommand. On an exception, stop the other ranks, which would hang."""
        config = self.config[subcommand]
        if subcommand == "replay":
            print(*replay(Path(config.file)), sep="\n")
            return
        if subcommand == "plan":
            print(plan_run(self.model, self.datamodule, config.trainer, config.num_devices, config.device_gib))
            return
        try:
            with warnings.catch_warnings():
                if subcommand != "fit":  # which needs the weights alone
                    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used")
                super()._run_subcommand(subcommand)
        except Exception:
            end_other_ranks(self.trainer)
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give each callback its own config key, so that one argument can be changed without repeating the list."""
        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            default=None,
            help="Number of torch threads of a rank; null for torch's default. Results depend on it by rounding.",
        )
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.every_n_epochs": 10})
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def before_fit(self) -> None:
        """Pass the config's values, as the user wrote them, to the dashboard."""
        values = plain(self._parser("fit"), self.config["fit"])
        for dashboard in callbacks_of(self.trainer, egspo_lightning.Dashboard):
            dashboard.hyperparameters = hyperparameters(values)

    def after_fit(self) -> None:
        """Print the scores, and the paths of logs and model."""
        print_fit_summary(self.trainer)

    def after_validate(self) -> None:
        """Print the scores, and the paths of the answers."""
        print_scores(self.trainer)

    after_test = after_validate

    def after_predict(self) -> None:
        """Print the first answers, and the path of all."""
        print_answers(self.trainer)


def _set_num_threads(number: int | None) -> None:
    if number is not None:
        os.environ["OMP_NUM_THREADS"] = str(number)  # read by further ranks, and by Lightning, which else sets a number
        torch.set_num_threads(int(number))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with one message and exit code 2."""
    arguments = list(sys.argv[1:] if args is None else args)
    answer_or_exit(arguments)
    try:
        run([argument for argument in arguments if argument != DEBUG])
    except RunStopped as stopped:
        if stopped.code:
            print(stopped, file=sys.stderr)
        raise
    except (Exception, SIGTERMException, KeyboardInterrupt) as error:  # for SIGTERM Lightning would exit with 0
        sys.exit(end(error, debug=DEBUG in arguments))


def run(args: Sequence[str] | None = None, kind: type[EgspoCLI] = EgspoCLI) -> EgspoCLI:
    """Run the command line from Python: errors are raised, and the finished CLI with its trainer is returned.

    Args:
        args: The command line, ``sys.argv[1:]`` by default.
        kind: Class of the CLI.
    """
    silence_noise()
    disable_progress_bar()
    require_ranks(os.environ)
    arguments = use_configs(sys.argv[1:] if args is None else args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizer threads are unsafe after a fork
    return kind(arguments)
