"""SIGTERM and SIGINT save a checkpoint and set the exit code; the resumed run equals an uninterrupted one."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SHORT = [
    "--config=configs/quickstart.yaml",
    "--trainer.max_epochs=40",
    "--trainer.enable_progress_bar=false",
    "--stage_transition.after_epochs=2",
    "--stage_transition.monitor=null",
    "--stage_transition.target=null",
    "--data.demonstrations.init_args.num_demonstrations=64",
    "--data.sft_batch_size=16",
    "--data.benchmarks=null",
    "--data.num_problems=4",
    "--data.num_generations=4",
    "--data.max_completion_length=40",
    "--data.reward=ranks_program.EvenBytes",
    "--hf_export.enabled=false",
]
DDP = [
    "--trainer.strategy=ddp",
    "--trainer.devices=2",
    "--trainer.max_epochs=14",
    "--token_records.every_n_rollout_batches=1",
]


def start(repository, root: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """Start the command in its own session; its output goes to a file."""
    here = str(Path(__file__).parent)
    with (root / "output").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "egspo_lightning", "fit", *SHORT, f"--trainer.default_root_dir={root}", *arguments],
            cwd=repository,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": here} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(process: subprocess.Popen, *, until, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not until() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def exit_code(process: subprocess.Popen) -> int:
    """Wait for the exit code, and assert that all processes of the run have ended."""
    try:
        code = process.wait(timeout=120)
        deadline = time.monotonic() + 60
        while _is_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _is_alive(process.pid), "a process of the run is still alive"
        return code
    finally:
        if _is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def _is_alive(group: int) -> bool:
    """Whether a process group has members other than zombies."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # the process has just ended
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                return True
    return False


def records_of(root: Path) -> list[Path]:
    return list(root.glob("lightning_logs/version_*/token_records/tokens-*.parquet"))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def alone(repository, tmp_path_factory) -> dict[str, torch.Tensor]:
    root = tmp_path_factory.mktemp("alone")
    assert exit_code(start(repository, root)) == 0, (root / "output").read_text()
    return weights(root / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_and_the_run_resumes(repository, tmp_path, alone, number):
    process = start(repository, tmp_path)
    wait_for(process, until=lambda: records_of(tmp_path))
    process.send_signal(number)
    assert exit_code(process) == 128 + number
    text = (tmp_path / "output").read_text()
    last = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    assert f"\nEnded by {number.name}. Saved {last}: resume with the same command and --ckpt_path last.\n" in text
    assert "Traceback" not in text
    step = torch.load(last, weights_only=True)["global_step"]
    assert 8 < step < 160
    assert exit_code(start(repository, tmp_path, "--ckpt_path=last")) == 0
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]
    ended = weights(last)
    assert all(torch.equal(value, ended[name]) for name, value in alone.items())


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_second_signal_ends_the_run_at_once(repository, tmp_path, staleness):
    """Even if the optimizer step or the sampling thread would take minutes."""
    slow = [
        f"--data.max_staleness={staleness}",
        "--data.reward=sleeping_reward.Sleeping",
        f"--data.reward.folder={tmp_path}",
        f"--data.reward.only_ahead={staleness > 0}",
        "--stage_transition.after_epochs=1",
    ]
    process = start(repository, tmp_path, *slow)
    wait_for(process, until=lambda: (tmp_path / "asleep").exists())
    process.send_signal(signal.SIGINT)
    wait_for(
        process, until=lambda: "the run saves and ends after this optimizer step" in (tmp_path / "output").read_text()
    )
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert exit_code(process) != 0
    assert time.monotonic() - started < 30


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_rollouts_that_are_sampled_ahead(repository, tmp_path, number):
    """The resumed run equals an uninterrupted one."""
    ended = []
    for name in ("alone", "interrupted"):
        root = tmp_path / name
        root.mkdir()
        process = start(repository, root, "--data.max_staleness=1")
        if name == "interrupted":
            wait_for(process, until=lambda root=root: records_of(root))
            process.send_signal(number)
            assert exit_code(process) == 128 + number, (root / "output").read_text()
            process = start(repository, root, "--data.max_staleness=1", "--ckpt_path=last")
        assert exit_code(process) == 0, (root / "output").read_text()
        assert "Traceback" not in (root / "output").read_text()
        ended.append(weights(root / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"))
    assert all(torch.equal(value, ended[1][name]) for name, value in ended[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("receivers", ["first", "all"])
def test_ranks_agree_on_the_last_optimizer_step(repository, tmp_path, number, receivers):
    process = start(repository, tmp_path, *DDP)
    wait_for(process, until=lambda: records_of(tmp_path))
    (os.kill if receivers == "first" else os.killpg)(process.pid, number)  # as scancel or torchrun, or as Ctrl-C
    assert exit_code(process) == 128 + number, (tmp_path / "output").read_text()
    text = (tmp_path / "output").read_text()
    assert text.count(f"Ended by {number.name}. Saved ") == 1
    assert "Traceback" not in text
    checkpoint = torch.load(tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert len(checkpoint["egspo"]["random"]) == 2
    assert exit_code(start(repository, tmp_path, *DDP, "--ckpt_path=last")) == 0, (tmp_path / "output").read_text()


@pytest.mark.slow
def test_slurm_requeues_the_run(repository, tmp_path, alone):
    """With SLURM's signal and environment, and a fake scontrol; Lightning resumes from hpc_ckpt by itself."""
    called = tmp_path / "called"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    slurm = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "egspo",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
    }
    process = start(repository, tmp_path, **slurm)
    wait_for(process, until=lambda: records_of(tmp_path))
    process.send_signal(signal.SIGUSR1)
    assert exit_code(process) == 128 + signal.SIGUSR1, (tmp_path / "output").read_text()
    assert called.read_text() == "requeue 4711\n"
    assert [path.name for path in tmp_path.glob("hpc_ckpt*")] == ["hpc_ckpt_1.ckpt"]
    assert exit_code(start(repository, tmp_path, **slurm)) == 0, (tmp_path / "output").read_text()
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_4711"]
    ended = weights(tmp_path / "lightning_logs" / "version_4711" / "checkpoints" / "last.ckpt")
    assert all(torch.equal(value, ended[name]) for name, value in alone.items())


@pytest.mark.slow
def test_a_run_with_killed_ranks_resumes_with_equal_losses(repository, tmp_path):
    """Losses are the scalars that TensorBoard shows."""
    often = [*DDP, "--checkpoint.every_n_epochs=0", "--checkpoint.every_n_train_steps=1"]
    roots = [tmp_path / name for name in ("alone", "killed")]
    for root in roots:
        root.mkdir()
    assert exit_code(start(repository, roots[0], *often)) == 0, (roots[0] / "output").read_text()
    for victim, number in ((0, 1), (1, 5), (0, 9)):  # record files, one per rank and rollout batch
        process = start(repository, roots[1], *often, "--ckpt_path=last")
        wait_for(process, until=lambda number=number: len(records_of(roots[1])) >= number)
        os.kill(process.pid if victim == 0 else child_of(process.pid), signal.SIGKILL)
        assert exit_code(process) != 0
    assert exit_code(start(repository, roots[1], *often, "--ckpt_path=last")) == 0, (roots[1] / "output").read_text()
    one, other = (losses(root / "lightning_logs" / "version_0") for root in roots)
    assert one == other
    assert len(one) == 14
    first, second = (weights(root / "lightning_logs/version_0/checkpoints/last.ckpt") for root in roots)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def child_of(pid: int) -> int:
    """The process of rank 1, a child of rank 0."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (rank,) = [int(c) for c in children if b"LOCAL_RANK=1" in Path(f"/proc/{c}/environ").read_bytes()]
    return rank


def losses(run: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars("loss/total")}
