"""If a rank dies, the run ends within a minute, shows the error, and leaves no process behind."""

import sys

import pytest

from processes import SFT_ON_TWO_RANKS, TORCHRUN, run_until_all_end


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
    run = [*SFT_ON_TWO_RANKS, f"--trainer.strategy={strategy}", *dies, f"--trainer.default_root_dir={tmp_path}"]
    command = [sys.executable, *(TORCHRUN if launcher == "torchrun" else []), *run]
    text = run_until_all_end(command, repository, tmp_path / "output", PYTHONPATH="tests/fit")  # ranks start in 10 s
    if has_error:
        assert "ArithmeticError: the rank has divided by zero" in text
