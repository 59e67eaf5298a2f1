"""Fixtures: real runs with token records of three rollout batches."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from egspo_lightning import TokenRecords
from egspo_lightning.analysis.record_reading import Records, load
from egspo_lightning.ops.gate import OpenGate

OPTIONS = {"initial_stage": "egspo"}


def train(tiny_run, folder: Path, **module) -> Path:
    run = tiny_run(
        TokenRecords(every_n_rollout_batches=1),
        module=OPTIONS | module,
        trainer={"max_epochs": 3, "logger": CSVLogger(folder, name=None, version="run")},
    ).fit()
    return Path(run.trainer.log_dir)


@pytest.fixture
def log_dir(tiny_run, tmp_path) -> Path:
    return train(tiny_run, tmp_path / "gated")


@pytest.fixture
def open_log_dir(tiny_run, tmp_path) -> Path:
    return train(tiny_run, tmp_path / "open", gate=OpenGate())


@pytest.fixture
def records(log_dir) -> Records:
    return load({"gated": log_dir})


@pytest.fixture
def two_runs(log_dir, open_log_dir) -> Records:
    return load({"gated": log_dir, "open": open_log_dir})
