"""Shared fixtures: paths, reference data, and small real training runs."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core, so one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from browser import Browser, chromium, missing_browser
from egspo_lightning.data.generated_sources import GeneratedDemonstrations, GeneratedProblems
from egspo_lightning.data.prompts import PromptTemplate
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.datamodule import HybridDataModule
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.module import EGSPOModule

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background jobs ignore Ctrl-C

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Reserve the port at which Lightning's ranks meet for this test.

    Lightning asks the system for a free port, releases it, and binds it seconds later, when another process may have
    taken it. This socket stays bound, so that the system gives the port to no other process. It does not listen and has
    SO_REUSEADDR, so the ranks can bind it.
    """
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("", 0))
        os.environ["STANDALONE_PORT"] = str(kept.getsockname()[1])
        try:
            return (yield)
        finally:
            _leave_process_group()


def _leave_process_group() -> None:
    """Remove the process group and variables of a strategy, which ranks of a later test would inherit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_model() -> str:
    return str(REPOSITORY / "configs" / "tiny_model")


@pytest.fixture(scope="session")
def shared_file() -> Callable[[str], Path]:
    """Locates a file of reference data beside the checkout; skips the test if it is absent."""

    def locate(name: str) -> Path:
        path = SHARED / name
        if not path.is_file():
            pytest.skip(f"needs the reference data in {path}")
        return path

    return locate


@pytest.fixture(scope="session")
def golden(shared_file: Callable[[str], Path]) -> Callable[[str], list[dict[str, Any]]]:
    """Loads results of reference implementations, stored beside the checkout."""

    def load(name: str) -> list[dict[str, Any]]:
        cases: list[dict[str, Any]] = json.loads(shared_file(f"golden/{name}.json").read_text())["cases"]
        assert cases
        return cases

    return load


# Small real runs: module, datamodule and trainer, with a model of about ten thousand parameters

SMALL_LM = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
DIGITS = ArithmeticTask(num_digits=1)
"""Sums of two one-digit numbers. The longest solution, "9+9=18 \\boxed{18}" and EOS, has 18 tokens."""


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of configs/tiny_model with fewer and narrower layers."""
    folder = tmp_path_factory.mktemp("model") / "small"
    shutil.copytree(REPOSITORY / "configs" / "tiny_model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SMALL_LM | {"num_hidden_layers": 1}))
    return str(folder)


@dataclass(frozen=True)
class EvenBytes:
    """Rewards the share of even bytes, which differs between completions of a random policy."""

    def __call__(self, completions: Sequence[str], golds: Sequence[str]) -> list[float]:
        return [sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1) for text in completions]


class TinyRun(NamedTuple):
    """Module, datamodule and trainer of a run that has not started."""

    module: EGSPOModule
    data: HybridDataModule
    trainer: Trainer

    def fit(self, **kwargs: Any) -> "TinyRun":
        self.trainer.fit(self.module, self.data, **kwargs)
        return self


@pytest.fixture
def tiny_run(small_model: str, tmp_path: Path) -> Callable[..., TinyRun]:
    """Builds small runs: SFT until a StageTransition ends it, then rollout batches of 4 problems x 4 completions.

    ``module``, ``data`` and ``trainer`` override arguments of the three classes. ``callbacks`` go to the trainer.
    ``logger=True`` adds a TensorBoard logger in tmp_path.
    """

    def build(
        *callbacks: Callback,
        module: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        logger: bool = False,
    ) -> TinyRun:
        seed_everything(1, verbose=False)
        in_module = {
            "policy": PolicyConfig(small_model, from_scratch=True),
            "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0),
        }
        in_data = {
            "demonstrations": GeneratedDemonstrations(num_demonstrations=32, task=DIGITS),
            "problems": GeneratedProblems(task=DIGITS),
            "reward": EvenBytes(),
            "prompt": PromptTemplate(plain="{problem}"),
            "sft_batch_size": 16,
            "expert_batch_size": 4,
            "num_problems": 4,
            "num_generations": 4,
            "num_minibatches": 2,
            "max_prompt_length": 8,
            "max_completion_length": 18,
            "seed": 1,
        }
        in_trainer = {
            "accelerator": "cpu",
            "max_epochs": 3,
            "reload_dataloaders_every_n_epochs": 1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
            "logger": TensorBoardLogger(tmp_path, name="logs") if logger else False,
        }
        return TinyRun(
            EGSPOModule(**(in_module | (module or {}))),
            HybridDataModule(**(in_data | (data or {}))),
            Trainer(**(in_trainer | (trainer or {})), callbacks=list(callbacks)),
        )

    return build


@pytest.fixture
def events() -> Callable[[Trainer], EventAccumulator]:
    """Reads the TensorBoard events of a run."""

    def read(trainer: Trainer) -> EventAccumulator:
        assert trainer.log_dir is not None
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
        accumulator = EventAccumulator(trainer.log_dir, size_guidance={"histograms": 0, "tensors": 0, "scalars": 0})
        return accumulator.Reload()

    return read


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """Chromium with an empty profile; skips where it is not installed."""
    if (missing := missing_browser()) is not None:
        pytest.skip(missing)
    with chromium(tmp_path / "profile") as session:
        yield session


@pytest.fixture
def overlay(tmp_path):
    """Writes a config file with the given content and returns its ``--config`` argument."""

    def write(content):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(content))
        return f"--config={path}"

    return write
