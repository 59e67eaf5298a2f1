"""A run that is killed ten times at random moments and resumed equals an uninterrupted run."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SHORT = [
    "--config=configs/quickstart.yaml",
    "--trainer.max_epochs=16",
    "--trainer.enable_progress_bar=false",
    "--stage_transition.after_epochs=3",
    "--stage_transition.monitor=null",
    "--stage_transition.target=null",
    "--data.demonstrations.init_args.num_demonstrations=64",
    "--data.sft_batch_size=16",
    "--data.benchmarks=null",
    "--data.num_problems=4",
    "--data.num_generations=4",
    "--data.max_completion_length=40",
    "--data.engine.max_batch_size=6",  # several engine batches per rollout batch
    "--data.reward=ranks_program.EvenBytes",  # an untrained policy can learn from it
    "--hf_export.enabled=false",
    "--token_records.every_n_rollout_batches=1",
]
SAVING = {
    "phases": ["--checkpoint.every_n_epochs=1"],
    "updates": ["--checkpoint.every_n_epochs=0", "--checkpoint.every_n_train_steps=1"],
    "ahead": ["--checkpoint.every_n_epochs=0", "--checkpoint.every_n_train_steps=1", "--data.max_staleness=1"],
}
EARLY = ("sft", "half", "whole", "replaced")
LATE = ("sampling", "grading", "update", "recording", "half", "whole", "replaced")


def moments_of(saving: str) -> list[str]:
    """Ten random moments as KIND:COUNT, where COUNT starts anew in each process."""
    drawn = random.Random(f"2602.03309/{saving}")
    early = drawn.sample(EARLY, 3) if saving == "phases" else ["sft", *drawn.sample(EARLY[1:], 2)]
    late = drawn.sample(LATE, 7)
    return [f"{moment}:{drawn.randint(1, 3)}" for moment in [*early, *late]]


def fit(repository, folder: Path, saving: str, moments: list[str]) -> Path:
    """Run with kills at the given moments; return the log folder of the last process."""
    folder.mkdir()
    arguments = [*SHORT, *SAVING[saving], f"--trainer.default_root_dir={folder}"]
    program = [sys.executable, str(Path(__file__).with_name("killing.py")), str(folder), *moments, "never:0", "--"]
    result = subprocess.run(
        [*program, *arguments],
        cwd=repository,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    ends = (folder / "ends").read_text().split("\n")[:-1]
    assert ends == [*(f"{moment} SIGKILL" for moment in moments), "never:0 0"], result.stderr[-3000:]
    return max(folder.glob("lightning_logs/version_*"), key=lambda path: int(path.name.split("_")[1]))


@pytest.fixture(scope="module", params=SAVING)
def runs(request, repository, tmp_path_factory) -> tuple[Path, Path]:
    """The log folders of an uninterrupted run and of one that was killed ten times."""
    folder, saving = tmp_path_factory.mktemp(request.param), request.param
    alone = fit(repository, folder / "alone", saving, [])
    return alone, fit(repository, folder / "killed", saving, moments_of(saving))


@pytest.mark.slow
def test_parameters_and_optimizer_are_bit_identical(runs):
    alone, killed = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in runs)
    assert alone["global_step"] == killed["global_step"] > 30
    assert alone["state_dict"].keys() == killed["state_dict"].keys()
    assert all(torch.equal(value, killed["state_dict"][name]) for name, value in alone["state_dict"].items())
    first, second = (run["optimizer_states"][0]["state"] for run in (alone, killed))
    assert first.keys() == second.keys() != set()
    assert all(
        torch.equal(first[n][name], second[n][name]) for n in first for name in ("step", "exp_avg", "exp_avg_sq")
    )
    assert alone["HybridDataModule"] == killed["HybridDataModule"]


@pytest.mark.slow
def test_token_records_are_equal_row_for_row(runs):
    alone, killed = (sorted((run / "token_records").iterdir()) for run in runs)
    assert [path.name for path in alone] == [path.name for path in killed]
    assert len(alone) == 2 * 13  # two tables per rollout batch
    assert all(pq.read_table(one).equals(pq.read_table(other)) for one, other in zip(alone, killed, strict=True))


@pytest.mark.slow
def test_metrics_are_equal_at_the_same_steps(runs):
    """As TensorBoard shows them; it hides values that a resumed run has logged again."""
    alone, killed = (scalars(run) for run in runs)
    assert alone.keys() == killed.keys()
    for name, values in alone.items():
        assert set(values) == set(killed[name]), name
        if not name.startswith("time/") and name != "rollout/tokens_per_second":
            assert values == killed[name], name


def scalars(run: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


@pytest.mark.slow
def test_no_partial_files_are_left(runs):
    for run in runs:
        assert not [path for path in run.rglob("*") if path.suffix in (".partial", ".previous")]
        assert torch.load(run / "sft.ckpt", weights_only=True)["egspo"]["stage"] == "egspo"
