"""A killed evaluation resumes, also on more ranks, and writes the same files as an uninterrupted one."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

from egspo_lightning.cli.main import run
from processes import run_in_group

SHORT = [
    "--config=configs/quickstart.yaml",
    "--trainer.max_epochs=6",
    "--data.sft_batch_size=16",
    "--math_benchmark.enabled=false",
    "--hf_export.enabled=false",
]
SAMPLED = [
    "--data.benchmarks.init_args.num_problems=21",
    "--data.benchmarks.init_args.num_samples=4",
    "--data.benchmarks.init_args.temperature=0.8",
    "--data.eval_batch_size=4",
    "--trainer.enable_progress_bar=false",
]


@pytest.fixture(scope="module")
def checkpoint(repository, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)
        cli = run(["fit", *SHORT, f"--trainer.default_root_dir={root}"])
    return Path(cli.trainer.log_dir) / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def uninterrupted(repository, checkpoint, tmp_path_factory) -> Path:
    """The evaluation folder of an uninterrupted process."""
    root = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)
        run(["test", *arguments(checkpoint, root)])
    return written(root)


def arguments(checkpoint: Path, root: Path) -> list[str]:
    return [
        "--config=configs/quickstart.yaml",
        *SAMPLED,
        f"--ckpt_path={checkpoint}",
        f"--trainer.default_root_dir={root}",
    ]


def written(root: Path) -> Path:
    (folder,) = (root / "evaluation").iterdir()
    return folder


def evaluate(repository, checkpoint: Path, root: Path, *more: str) -> tuple[int, str]:
    """Run the command in other processes; return its exit code and output."""
    command = [sys.executable, "-m", "egspo_lightning", "test", *arguments(checkpoint, root), *more]
    output, code = run_in_group(command, repository, PYTHONPATH=str(Path(__file__).parent))
    return code, output


@pytest.fixture(scope="module")
def killed(repository, checkpoint, tmp_path_factory) -> Path:
    """The root folder of an evaluation that was killed while it wrote a line."""
    root = tmp_path_factory.mktemp("killed")
    dying = ["--data.evaluation_grader=dying_grader.DyingGrader", "--data.evaluation_grader.num_batches=3"]
    code, output = evaluate(repository, checkpoint, root, *dying)
    assert code == -signal.SIGKILL, output
    part = written(root) / "completions-rank-0.jsonl"
    kept = part.read_bytes()
    assert len(kept.splitlines()) == 2 * 4 * 4  # two batches of four problems, four answers each
    part.write_bytes(kept[:-30])
    return root


@pytest.mark.slow  # trains, and evaluates three times
def test_a_killed_evaluation_resumes(repository, checkpoint, uninterrupted, killed, tmp_path, monkeypatch, caplog):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(repository)
    with caplog.at_level("INFO"):
        run(["test", *arguments(checkpoint, tmp_path)])
    assert_resumed(tmp_path, uninterrupted, caplog.text)


@pytest.mark.slow  # combines the tests above and below
def test_a_killed_evaluation_resumes_on_more_ranks(repository, checkpoint, uninterrupted, killed, tmp_path):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    code, output = evaluate(repository, checkpoint, tmp_path, "--trainer.strategy=ddp", "--trainer.devices=2")
    assert code == 0, output
    assert_resumed(tmp_path, uninterrupted, output)


def assert_resumed(root: Path, uninterrupted: Path, output: str) -> None:
    assert "7 of 21 problems were answered before" in output
    folder = written(root)
    assert sorted(path.name for path in folder.iterdir()) == ["completions.jsonl", "metrics.json", "settings.json"]
    for name in ("completions.jsonl", "settings.json", "metrics.json"):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes(), name


@pytest.mark.slow
def test_two_ranks_write_the_same_files_as_one(repository, checkpoint, uninterrupted, tmp_path):
    code, output = evaluate(repository, checkpoint, tmp_path, "--trainer.strategy=ddp", "--trainer.devices=2")
    assert code == 0, output
    assert "answered before" not in output
    for name in ("completions.jsonl", "settings.json", "metrics.json"):
        assert (written(tmp_path) / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    metrics = json.loads((uninterrupted / "metrics.json").read_text())["metrics"]
    assert metrics["num_problems"] == 21
    assert 0 < metrics["avg@4"] < metrics["pass@4"] < 1
