"""Two ranks, which communicate through gloo, compute the same metrics as one process."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from processes import TORCHRUN, compare_metrics, read_rows, run_in_group

SHORT = [
    "--trainer.max_epochs=4",
    "--stage_transition.after_epochs=2",
    "--data.demonstrations.init_args.num_demonstrations=100",
    "--data.benchmarks.init_args.num_problems=33",
    "--data.num_problems=4",
    "--data.max_completion_length=40",
    "--trainer.logger=CSVLogger",
]
DDP = ["--trainer.strategy=ddp", "--trainer.devices=2"]
FSDP2 = ["--trainer.strategy=fsdp2", "--trainer.devices=2"]


def fit(repository, folder, *arguments):
    """Run a short quickstart and return its rows of metrics."""
    command = ["-m", "egspo_lightning", "fit", "--config=configs/quickstart.yaml", *SHORT, *arguments]
    python(repository, *command, f"--trainer.default_root_dir={folder}", f"--trainer.logger.save_dir={folder}")
    return read_rows(folder)


def python(repository, *arguments):
    """Run Python in its own process group with a time limit."""
    output, code = run_in_group([sys.executable, *arguments], repository)
    assert code == 0, output


def assert_equal_metrics(rows, expected):
    assert compare_metrics(rows, expected) > 50


@pytest.fixture(scope="module")
def one_process(repository, tmp_path_factory):
    return fit(repository, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_processes(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    return folder, fit(repository, folder, *DDP)


@pytest.mark.slow
def test_ddp_on_two_processes_equals_one(two_processes, one_process):
    _, rows = two_processes
    first = next(i for i, row in enumerate(one_process) if row["loss/total"])
    assert float(rows[first]["loss/total"]) == pytest.approx(float(one_process[first]["loss/total"]), rel=1e-5)
    assert_equal_metrics(rows, one_process)


def test_each_rank_records_its_own_tokens(two_processes):
    records = two_processes[0] / "lightning_logs" / "version_0" / "token_records"
    for kind in ("tokens", "completions"):
        names = [f"{kind}-000000-rank-{rank}.parquet" for rank in (0, 1)]
        assert sorted(path.name for path in records.glob(f"{kind}-*")) == names
        ids = [set(pq.read_table(records / name)["completion_id"].to_pylist()) for name in names]
        assert ids == [{f"0/{rank}/{row}" for row in range(16)} for rank in (0, 1)]  # of 4 problems x 8


@pytest.mark.slow
def test_fsdp2_on_two_processes_equals_one(repository, tmp_path, one_process):
    assert_equal_metrics(fit(repository, tmp_path, *FSDP2), one_process)


@pytest.mark.slow
def test_accumulation_on_two_processes_equals_one(repository, tmp_path, one_process):
    assert_equal_metrics(fit(repository, tmp_path, *DDP, "--trainer.accumulate_grad_batches=3"), one_process)


# Token budget of micro-batches

BUDGET = ["--data.max_tokens_per_micro_batch=120"]


@pytest.fixture(scope="module")
def without_budget(run_ranks, tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("whole"), {"whole": []}, num_ranks=1)["whole"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [pytest.param(DDP, id="ddp"), pytest.param(FSDP2, id="fsdp2")])
def test_ranks_agree_on_the_number_of_micro_batches(run_ranks, without_budget, tmp_path, strategy):
    """The optimizer steps equal those of one process without a token budget."""
    rows = run_ranks(tmp_path, {"budget": [*strategy, *BUDGET]})["budget"]
    numbers = [float(row["update/micro_batches"]) for row in rows if row["loss/total"]]
    assert len(numbers) == 4
    assert min(numbers) > 1
    assert len(set(numbers)) > 1
    assert_equal_metrics(rows, without_budget)


# Methods with sums over ranks, or whose ranks do different work

METHODS = ["ppo", "ppo_critic", "reinforce_plus_plus", "dynamic_sampling", "luffy", "sequence_gate"]


def fit_methods(repository, folder, strategy, methods):
    """Run the methods and return their rows of metrics."""
    program = str(Path(__file__).with_name("ranks_program.py"))
    python(repository, *([] if strategy == "alone" else TORCHRUN), program, str(folder), strategy, *methods)
    return {method: read_rows(folder / method) for method in methods}


@pytest.fixture(scope="module")
def methods_alone(repository, tmp_path_factory):
    return fit_methods(repository, tmp_path_factory.mktemp("alone"), "alone", METHODS)


@pytest.fixture(scope="module")
def methods_on_two(repository, tmp_path_factory):
    return fit_methods(repository, tmp_path_factory.mktemp("two"), "ddp", METHODS)


@pytest.fixture(scope="module")
def critics_sharded(repository, tmp_path_factory):
    return fit_methods(repository, tmp_path_factory.mktemp("sharded"), "fsdp2", ["ppo", "ppo_critic"])


SHOWN_BY = {
    "ppo": "loss/value",
    "ppo_critic": "loss/value",
    "reinforce_plus_plus": "rollout/kl_coefficient",
    "dynamic_sampling": "rollout/resampled_groups",
    "luffy": "rollout/zero_spread_fraction",
    "sequence_gate": "gate/threshold",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_two_processes_equals_one(methods_alone, methods_on_two, method):
    rows = [row for row in methods_alone[method] if row.get(SHOWN_BY[method])]
    assert len(rows) == 3  # rollout batches
    assert any(float(row[SHOWN_BY[method]]) != 0 for row in rows)
    assert any(float(row["loss/egspo"]) != 0 for row in rows)
    assert_equal_metrics(methods_on_two[method], methods_alone[method])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "ppo_critic"])
def test_a_sharded_critic_on_two_processes_equals_one(methods_alone, critics_sharded, method):
    assert_equal_metrics(critics_sharded[method], methods_alone[method])


LEAVING = """
import atexit, concurrent.futures, sys, threading, torch
from egspo_lightning.cli.process_exit import leave
leave(0)
print("no rank yet")
atexit.register(print, "at exit")
pool = concurrent.futures.ThreadPoolExecutor(1)
pool.submit(int).result()  # leaves an idle, live thread
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
leave(143)
print("not reached")
"""


def test_a_rank_exits_with_its_code_despite_idle_threads(repository):
    output, code = run_in_group([sys.executable, "-c", LEAVING], repository, 60)
    assert code == 143
    assert output.split("\n") == ["no rank yet", "at exit", ""]
