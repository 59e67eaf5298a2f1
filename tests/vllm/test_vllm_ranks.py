"""VLLMEngine on two ranks, which communicate through gloo: each has an engine of its own, or both share one."""

import json
import re
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
GROUP = ["--data.engine.tensor_parallel_size=2"]
KINDS = {"tied": ("tied", []), "untied": ("untied", []), "lora": ("tied", LORA), "group": ("even", GROUP)}
"""Kind of a run to its model and arguments; in ``group`` both ranks share an engine."""
CASES = [f"{strategy}-{kind}" for strategy in ("ddp", "fsdp2") for kind in KINDS]


@pytest.fixture(scope="module")
def models(repository, tiny_model, tmp_path_factory):
    """Folder with the models of ``program.save``."""
    folder = tmp_path_factory.mktemp("models")
    output, code = run_in_group(
        [sys.executable, str(FOLDER / "program.py"), "save", tiny_model, str(folder)], repository
    )
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def findings(models, repository, tmp_path_factory):
    """What each rank has found at the end of each run, by the names of ``CASES``."""
    folder, runs = tmp_path_factory.mktemp("ranks"), {}
    for case in CASES:
        strategy, kind = case.split("-")
        name, arguments = KINDS[kind]
        arguments = [*arguments, f"--trainer.strategy={strategy}", "--trainer.devices=2"]
        arguments += [f"--model.policy.name_or_path={models / name}"]
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
    """Without a group only the last rank has sampled since the last reset, and so has cached prefixes."""
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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_group_stays_in_step_or_ends_with_an_error(findings, strategy):
    """One rank stops early; then both sample with different seeds."""
    for rank in findings[f"{strategy}-group"]:
        assert rank["stopped"]
        assert rank["disagreement"].startswith("RuntimeError: The ranks of a tensor parallel group of VLLMEngine")


@pytest.mark.parametrize("kind", KINDS)
def test_copying_shards_holds_no_more_than_the_largest_block_or_parameter(findings, kind):
    """The measurement is too high by some small tensors. The vocabulary of the untied model outweighs its blocks."""
    for rank in findings[f"fsdp2-{kind}"]:
        memory = rank["memory"]
        assert memory["copied"] < 1.25 * memory["largest"]
        assert memory["gathered"] >= memory["all"] > 2 * memory["largest"]


DYING = [*SFT_ON_TWO_RANKS, "--data.engine=dying_vllm.DyingVLLM", "--data.engine.max_model_len=128"]


ENDS = {
    "ddp-lightning": ("sampling", "ddp", [], 1, 1, r"terminated with code -9|A rank of this run has ended \(process "),
    "first-lightning": ("sampling", "ddp", [], 0, 1, r"A rank of this run has ended \(process "),
    "fsdp2-torchrun": ("sampling", "fsdp2", TORCHRUN, 0, 1, r"Signal 9 \(SIGKILL\) received by PID"),
    "group-lightning": ("sampling", "fsdp2", [], 0, 2, r"A rank of this run has ended \(process "),
    "start-lightning": ("start", "ddp", [], 0, 1, r"A rank of this run has ended \(process |\nerror: .*Error: "),
}
"""Moment, strategy, launcher, rank that ends, tensor parallel size, pattern of the message."""


@pytest.mark.parametrize("case", ENDS)
def test_a_rank_that_ends_alone_ends_the_run(models, repository, tmp_path, case):
    """Within a minute, with a message; it leaves no process, so no port, and no shared memory behind.

    Under Lightning the launcher ends with the first rank, and a rank of a group waits for the other one in C++.
    """
    moment, strategy, launcher, rank, size, message = ENDS[case]
    ended, shared = tmp_path / "ended", Path("/dev/shm")
    before = set(shared.iterdir())
    run = [*DYING, f"--trainer.strategy={strategy}", f"--trainer.default_root_dir={tmp_path}"]
    run += [f"--data.engine.rank={rank}", f"--data.engine.file={ended}", f"--data.engine.moment={moment}"]
    run += [f"--data.engine.tensor_parallel_size={size}", f"--model.policy.name_or_path={models / 'even'}"]
    log = tmp_path / "output"
    text = run_until_all_end([sys.executable, *launcher, *run], repository, log, timeout=300, **ENVIRONMENT)
    assert ended.exists(), text
    assert time.time() - ended.stat().st_mtime < 70, "a minute, and ten seconds for the processes to end"
    assert re.search(message, text), text
    assert set(shared.iterdir()) <= before
