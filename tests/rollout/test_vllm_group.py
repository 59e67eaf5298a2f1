"""Groups of ranks that sample together, in real processes; tests/vllm runs vLLM itself."""

import subprocess
import sys

import pytest

RANK = """
import sys, time
import torch
from egspo_lightning.rollout import vllm_group
from egspo_lightning.rollout.engine import Sample
from egspo_lightning.rollout.rank_watch import processes_here, watched
rank, store, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
vllm_group.OUT_OF_STEP_S = 2.0
def stream(requests):
    yield [(number, Sample([number], False, [0.0])) for number in range(len(requests))]
    time.sleep(seconds)  # a further step, in which the rank waits for the other one
requests = ["first", "second"][: 2 - rank]
with watched(processes_here()):
    print(list(vllm_group.stream_together(requests, stream, torch.distributed.group.WORLD, lambda: True)))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
"""A rank with two requests, or with one, whose last step takes some time."""


def run_ranks(repository, tmp_path, *seconds):
    """Output, errors and exit code of each rank."""
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), each],
            cwd=repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, each in enumerate(seconds)
    ]
    return [(*rank.communicate(timeout=60), rank.returncode) for rank in ranks]


def test_each_rank_gets_the_samples_of_its_own_requests(repository, tmp_path):
    ranks = run_ranks(repository, tmp_path, "0", "0")
    assert [code for *_, code in ranks] == [0, 0], ranks
    first, second = (output for output, *_ in ranks)
    assert [first.count("Sample("), second.count("Sample(")] == [2, 1]
    assert "(0, Sample(token_ids=[2]" in second


@pytest.mark.parametrize("stuck", [0, 1])
def test_ranks_that_are_out_of_step_end(repository, tmp_path, stuck):
    """One waits in a step that the other does not make: the other ends with an error, and then the first."""
    seconds = ["100" if rank == stuck else "0" for rank in (0, 1)]
    ranks = run_ranks(repository, tmp_path, *seconds)
    assert [code for *_, code in ranks] == [1, 1]
    assert "sampled different tokens for the same requests" in ranks[1 - stuck][1]
    assert "A rank of this run has ended (process " in ranks[stuck][1]
