"""VLLMEngine on two ranks, which communicate through gloo: each has an engine of its own, with the policy's weights."""

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from processes import SFT_ON_TWO_RANKS, TORCHRUN, run_in_group, run_until_all_end

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; see tests/vllm/requirements.txt"),
]
FOLDER = Path(__file__).parent
PATHS = ":".join(str(FOLDER.parent / name) for name in ("vllm", "fit", "fixtures"))
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": PATHS}
LARGEST_GAP = 1e-4
"""Nats, as on one rank."""
LORA = ["--model.policy.lora.rank=4", "--model.policy.lora.target_modules=[embed_tokens,q_proj,down_proj]"]
CASES = [f"{strategy}-{kind}" for strategy in ("ddp", "fsdp2") for kind in ("tied", "untied", "lora")]


@pytest.fixture(scope="module")
def findings(repository, tiny_model, tmp_path_factory):
    """What each rank has found at the end of each run, by the names of ``CASES``."""
    folder, runs = tmp_path_factory.mktemp("ranks"), {}
    output, code = run_in_group(
        [sys.executable, str(FOLDER / "program.py"), "save", tiny_model, str(folder)], repository
    )
    assert code == 0, output
    for case in CASES:
        strategy, kind = case.split("-")
        arguments = [f"--trainer.strategy={strategy}", "--trainer.devices=2", *(LORA if kind == "lora" else [])]
        arguments += [f"--model.policy.name_or_path={folder / ('untied' if kind == 'untied' else 'tied')}"]
        arguments += ["--data.max_staleness=1"] if case == "ddp-tied" else []  # a thread samples the second batch
        runs[case] = arguments
    command = [sys.executable, *TORCHRUN, str(FOLDER / "ranks_program.py"), str(folder), json.dumps(runs)]
    output, code = run_in_group(command, repository, 600, **ENVIRONMENT)
    assert code == 0, output
    return {case: [json.loads((folder / case / f"{rank}.json").read_text()) for rank in (0, 1)] for case in CASES}


def agrees(found):
    """Whether greedy tokens equal those of the transformers engine, and log-probabilities those of a forward pass."""
    return all(all(same) for same in found["same"].values()) and found["gap"] <= LARGEST_GAP


@pytest.mark.parametrize("case", CASES)
def test_every_rank_samples_from_the_trained_policy(findings, case):
    """With eight requests on one rank and five on the other; then with none on the first."""
    for moment, numbers in (("trained", [8, 5]), ("changed", [0, 8])):
        found = [rank[moment] for rank in findings[case]]
        assert [len(each["tokens"]) for each in found] == numbers
        assert all(map(agrees, found)), found


@pytest.mark.parametrize("case", CASES)
def test_the_comparison_detects_a_skipped_copy_and_a_skipped_reset(findings, case):
    """Only the last rank has sampled since the last reset, and so has cached prefixes."""
    for rank in findings[case]:
        assert rank["no copy"]["gap"] > 1
        assert not any(rank["no copy"]["same"]["200"])
    stale = findings[case][1]["no reset"]
    assert stale["gap"] > 1
    assert (any(stale["same"]["200"]), all(stale["same"]["5"])) == (False, True)


@pytest.mark.parametrize("case", CASES)
def test_a_sample_does_not_depend_on_its_rank(findings, case):
    first, second = (rank["trained"]["tokens"] for rank in findings[case])
    assert len(first.keys() & second.keys()) == 5
    assert all(first[seed] == second[seed] for seed in second)


@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_copying_shards_holds_no_more_than_the_largest_block_or_parameter(findings, kind):
    """The measurement is too high by some small tensors. The vocabulary of the untied model outweighs its blocks."""
    for rank in findings[f"fsdp2-{kind}"]:
        memory = rank["memory"]
        assert memory["copied"] < 1.25 * memory["largest"]
        assert memory["gathered"] >= memory["all"] > 2 * memory["largest"]


DYING = [
    *SFT_ON_TWO_RANKS,
    "--data.engine=dying_vllm.DyingVLLM",
    "--data.engine.max_model_len=128",
    "--data.engine.kv_cache_gib=0.25",
]


@pytest.mark.parametrize(
    ("strategy", "launcher", "rank", "message"),
    [("ddp", [], 1, "terminated with code -9"), ("fsdp2", TORCHRUN, 0, "Signal 9 (SIGKILL) received by PID")],
    ids=["ddp-lightning", "fsdp2-torchrun"],
)
def test_a_rank_killed_while_it_samples_ends_the_run(repository, tmp_path, strategy, launcher, rank, message):
    """Within a minute, with a message; it leaves no process, so no port, and no shared memory behind."""
    killed, shared = tmp_path / "killed", Path("/dev/shm")
    before = set(shared.iterdir())
    run = [*DYING, f"--trainer.strategy={strategy}", f"--data.engine.rank={rank}"]
    run += [f"--data.engine.file={killed}", f"--trainer.default_root_dir={tmp_path}"]
    log = tmp_path / "output"
    text = run_until_all_end([sys.executable, *launcher, *run], repository, log, timeout=300, **ENVIRONMENT)
    assert killed.exists(), text
    assert time.time() - killed.stat().st_mtime < 70, "a minute, and ten seconds for the processes to end"
    assert message in text
    assert set(shared.iterdir()) <= before
