"""Malformed user input in real command-line runs: one short error message, soon, with no orphan process or file.

``malformed.CASES`` holds the inputs. Each runs ``python -m egspo_lightning`` in a fork of a process that has imported
it. A slow test runs some cases in new processes too, and compares the messages.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "1000", "CUDA_VISIBLE_DEVICES": ""}


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


malformed = _load("malformed")


@pytest.fixture(scope="session")
def finished(start, smallest, small_model, tmp_path_factory):
    """Log folder of a valid run that has finished."""
    folder = tmp_path_factory.mktemp("good")
    run = smallest(folder, small_model)
    run.put("hf_export.enabled", True)
    ended = start(folder, *run.command)
    assert ended.code == 0, ended.output
    assert ended.orphans == []
    return folder / "logs" / "lightning_logs" / "version_0"


@pytest.fixture
def malformed_run(finished, smallest, small_model, repository, tmp_path):
    """Builds the run of a case by name."""

    def build(name):
        shutil.copytree(repository / "configs" / "methods", tmp_path / "methods")
        run = smallest(tmp_path, small_model)
        run.exported, run.checkpoint = finished / "hf", finished / "checkpoints" / "last.ckpt"
        malformed.CASES[name].apply(run)
        return run

    return build


def test_at_least_100_cases_with_expected_words():
    assert len(malformed.CASES) >= 100
    assert all(case.words for case in malformed.CASES.values())


def mark_most_slow(names):
    """Keep a fifth of the cases in the fast run; CI runs all."""
    return [pytest.param(name, marks=[pytest.mark.slow] if i % 5 else []) for i, name in enumerate(names)]


@pytest.mark.parametrize("name", mark_most_slow(malformed.CASES))
def test_malformed_input_prints_one_error_without_traceback(start, malformed_run, name):
    run = malformed_run(name)
    given = {path for path in run.folder.rglob("*") if path.is_file()}
    ended = start(run.folder, *run.command, environment=run.environment, seconds=30)
    assert ended.code in (1, 2), ended
    assert "Traceback" not in ended.output
    for word in malformed.CASES[name].words:
        assert word in ended.output
    assert "error: " in ended.output
    assert ended.output.count("\nerror: ") + ended.output.startswith("error: ") <= 2  # one per rank
    assert len(ended.output) < 6000
    assert ended.orphans == []
    assert not (run.folder / "ran").exists()
    written = {path for path in run.folder.rglob("*") if path.is_file()} - given
    assert_complete(written - {run.folder / "output.txt", run.folder / "run.yaml"})


def assert_complete(paths):
    """Read each file with the reader for its format, which fails on a partial file."""
    for path in paths:
        if path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(path.read_text()), dict)
        elif path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.name.startswith("events.out.tfevents."), path  # an append-only log


@pytest.mark.parametrize("name", ["null_task", "broken_json", "text_for_a_checkpoint", "truncated_weights"])
def test_debug_flag_shows_traceback(start, malformed_run, name):
    run = malformed_run(name)
    ended = start(run.folder, *run.command, "--debug", environment=run.environment)
    assert ended.code == 2
    assert "Traceback" in ended.output
    assert ended.output.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(malformed.CASES)[::10])
def test_new_process_prints_same_error_as_warm_process(start, malformed_run, name):
    run = malformed_run(name)
    warm = start(run.folder, *run.command, environment=run.environment)
    process = subprocess.run(
        [sys.executable, "-m", "egspo_lightning", *run.command],
        cwd=run.folder,
        env=os.environ | ENVIRONMENT | run.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == warm.code
    assert _error(process.stderr) == _error(warm.output)


def _error(output):
    return output[output.index("error: ") :]
