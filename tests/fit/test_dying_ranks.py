"""If a rank dies, the run ends within a minute, shows the error, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

RUN = [
    "-m",
    "egspo_lightning",
    "fit",
    "--config=configs/quickstart.yaml",
    "--trainer.devices=2",
    "--data.demonstrations.init_args.num_demonstrations=128",
    "--data.sft_batch_size=16",
    "--data.benchmarks=null",
    "--stage_transition.after_epochs=1",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def processes_of(session):
    """All live processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
@pytest.mark.parametrize("how", ["error", "kill"])
@pytest.mark.parametrize(("rank", "strategy"), [(0, "ddp"), (1, "ddp"), (1, "fsdp2")])
def test_a_dead_rank_ends_the_run(repository, tmp_path, rank, how, strategy, launcher):
    dies = [
        "--trainer.callbacks+=dying_rank.DyingRank",
        f"--trainer.callbacks.rank={rank}",
        f"--trainer.callbacks.how={how}",
    ]
    assert_run_ends(repository, tmp_path, strategy, launcher, dies, has_error=how == "error")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_sampling_thread_ends_the_run(repository, tmp_path, rank):
    """One rank fails while it samples ahead, and the other trains."""
    fails = [
        "--data.max_staleness=1",
        "--data.reward=dying_rank.FailingAhead",
        f"--data.reward.rank={rank}",
        "--data.reward.num_completions=64",  # half of the quickstart's 128
    ]
    assert_run_ends(repository, tmp_path, "ddp", "lightning", fails, has_error=True)


def assert_run_ends(repository, tmp_path, strategy, launcher, dies, *, has_error):
    run = [*RUN, f"--trainer.strategy={strategy}", *dies, f"--trainer.default_root_dir={tmp_path}"]
    log = tmp_path / "output"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *(TORCHRUN if launcher == "torchrun" else []), *run],
            cwd=repository,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "tests/fit"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=90)  # two ranks start in 10 s
            deadline = time.monotonic() + 10
            while processes_of(process.pid) and time.monotonic() < deadline:
                time.sleep(0.2)
            left = [" ".join(p.cmdline()) for p in processes_of(process.pid)]
        finally:
            for each in processes_of(process.pid):
                os.kill(each.pid, signal.SIGKILL)
    text = log.read_text()
    assert code != 0, text
    assert not left, text
    if has_error:
        assert "ArithmeticError: the rank has divided by zero" in text
