"""What users get wrong, as real runs of the command line: told in one message, soon, with nothing left behind.

``malformed.CASES`` holds the inputs. Each runs ``python -m egspo_lightning`` in a fork of a process that has imported
it; the slow test runs some of them in processes started anew, and both must say the same.
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
    """A run that nothing was wrong with: its log folder."""
    folder = tmp_path_factory.mktemp("good")
    run = smallest(folder, small_model)
    run.put("hf_export.enabled", True)
    ended = start(folder, *run.command)
    assert ended.code == 0, ended.output
    assert ended.left == []
    return folder / "logs" / "lightning_logs" / "version_0"


@pytest.fixture
def spoiled(finished, smallest, small_model, repository, tmp_path):
    """Makes the run of a case."""

    def spoil(name):
        shutil.copytree(repository / "configs" / "methods", tmp_path / "methods")
        run = smallest(tmp_path, small_model)
        run.exported, run.checkpoint = finished / "hf", finished / "checkpoints" / "last.ckpt"
        malformed.CASES[name].spoil(run)
        return run

    return spoil


def test_there_are_enough_of_them():
    assert len(malformed.CASES) >= 100
    assert all(case.words for case in malformed.CASES.values())


def some_at_a_time(names):
    """A third of the cases in the fast run, all of them in CI."""
    return [pytest.param(name, marks=[pytest.mark.slow] if i % 3 else []) for i, name in enumerate(names)]


@pytest.mark.parametrize("name", some_at_a_time(malformed.CASES))
def test_a_malformed_input_is_told(start, spoiled, name):
    run = spoiled(name)
    given = {path for path in run.folder.rglob("*") if path.is_file()}
    ended = start(run.folder, *run.command, environment=run.environment, seconds=30)
    assert ended.code in (1, 2), ended
    assert "Traceback" not in ended.output
    for word in malformed.CASES[name].words:
        assert word in ended.output
    assert "error: " in ended.output
    assert ended.output.count("\nerror: ") + ended.output.startswith("error: ") <= 2  # of each rank
    assert len(ended.output) < 6000
    assert ended.left == []
    assert not (run.folder / "ran").exists()
    written = {path for path in run.folder.rglob("*") if path.is_file()} - given
    assert_whole(written - {run.folder / "output.txt", run.folder / "run.yaml"})


def assert_whole(paths):
    """No file is half of one: each is read by what reads its kind."""
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
            assert path.name.startswith("events.out.tfevents."), path  # a log, appended to


@pytest.mark.parametrize("name", ["null_task", "broken_json", "text_for_a_checkpoint", "truncated_weights"])
def test_debug_shows_where_it_was_raised(start, spoiled, name):
    run = spoiled(name)
    ended = start(run.folder, *run.command, "--debug", environment=run.environment)
    assert ended.code == 2
    assert "Traceback" in ended.output
    assert ended.output.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(malformed.CASES)[::10])
def test_a_process_started_anew_says_the_same(start, spoiled, name):
    run = spoiled(name)
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
    assert _last(process.stderr) == _last(warm.output)


def _last(output):
    return output[output.index("error: ") :]
