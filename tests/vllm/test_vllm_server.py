"""VLLMServerEngine with a real server on a CPU; tests/vllm/requirements.txt describes installation and command."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from egspo_lightning.errors import UserError
from egspo_lightning.rollout.vllm_server import START_COMMAND, VLLMServerEngine
from egspo_lightning.types import Sampling
from processes import SFT_ON_TWO_RANKS, TORCHRUN, processes_of, run_in_group, run_until_all_end

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; see tests/vllm/requirements.txt"),
]
FOLDER = Path(__file__).parent
PATHS = ":".join(str(FOLDER.parent / name) for name in ("..", "vllm", "fit", "fixtures"))
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": PATHS}
LARGEST_GAP = 1e-4
"""Nats, as for VLLMEngine."""
SAMPLING = Sampling(12)
ON_A_CPU = ["--enforce-eager", "--kv-cache-memory-bytes=268435456", "--no-enable-chunked-prefill"]
"""A small cache, no compilation, and whole prompts: vLLM's engine ends with an error if it cuts a prompt of a request
with a seed on a CPU ("CPU Generator does not use offset")."""


@pytest.fixture(scope="module")
def program():
    """The module with the cases of VLLMEngine."""
    sys.path.insert(0, str(FOLDER))
    import program

    yield program
    sys.path.remove(str(FOLDER))


class Server:
    """A server, started by the documented command with a short context."""

    def __init__(self, model, repository, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.repository, self.log = f"http://127.0.0.1:{self.port}", repository, log
        command = START_COMMAND.format(port=self.port).replace("DTYPE", "float32")
        self.command = command.replace("FOLDER_OR_NAME", shlex.quote(model))

    def start(self):
        setting, python, *arguments = shlex.split(self.command)
        assert (setting, python) == ("VLLM_SERVER_DEV_MODE=1", "python")
        own = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(self.repository)}
        own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # else it stays on the first core, which others may use
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *arguments, "--max-model-len=512", *ON_A_CPU],
                env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"} | own,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 600
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.5)

    def answers(self):
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self):
        """Kill the process that answers; vLLM's other processes outlive it, and remove their shared memory when told to
        end.
        """
        self.process.kill()
        self.process.wait()
        for each in processes_of(self.process.pid):
            each.terminate()
        deadline = time.monotonic() + 60
        while processes_of(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        for each in processes_of(self.process.pid):
            each.kill()


@pytest.fixture(scope="module")
def server(tiny_model, repository, tmp_path_factory):
    server = Server(tiny_model, repository, tmp_path_factory.mktemp("server") / "log")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def engine(server):
    return VLLMServerEngine(server.address)


def agrees(found):
    """Whether greedy tokens equal those of the transformers engine, and log-probabilities those of a forward pass."""
    assert found["of"] == 4
    return found["same"] == {5: 4, 200: 4} and found["gap"] <= LARGEST_GAP


def tokens(found):
    return [sample.token_ids for sample in found]


def test_samples_come_from_the_current_policy(engine, program, tiny_model):
    lm = program.model(tiny_model, tied=True)
    found = [program.compare(engine, lm)]
    program.randomize(lm, 1)
    found.append(program.compare(engine, lm))
    found.append(program.compare(engine, program.model(tiny_model, tied=True, seed=2)))
    assert [agrees(each) for each in found] == [True, True, True], found


@pytest.mark.parametrize(("step", "same"), [("copy_weights", {5: 0, 200: 0}), ("_forget_prefixes", {5: 4, 200: 0})])
def test_the_comparison_detects_a_skipped_copy_and_a_skipped_reset(engine, program, tiny_model, step, same):
    lm = program.model(tiny_model, tied=True)
    assert agrees(program.compare(engine, lm))
    setattr(engine, step, lambda *_: None)
    program.randomize(lm, 1)
    stale = program.compare(engine, lm)
    assert stale["gap"] > 1
    assert stale["same"] == same


def test_samples_are_independent_and_an_unfinished_stream_leaves_no_requests(engine, program, tiny_model):
    lm, requests = program.model(tiny_model, tied=True), program.make_requests()
    together = tokens(program.sample(engine, lm, requests, SAMPLING))
    assert len({tuple(each) for each in together}) == 8
    assert [tokens(program.sample(engine, lm, [request], SAMPLING))[0] for request in requests] == together
    stream = engine.stream(lm, [*requests, *program.make_requests(40)], Sampling(200), eos_ids=[256], pad_id=257)
    next(stream)
    stream.close()
    assert tokens(program.sample(engine, lm, requests, SAMPLING)) == together
    ends = sorted({token for each in together for token in each[1:]})[:40]
    stopped = list(engine.stream(lm, requests, SAMPLING, eos_ids=ends, pad_id=257))
    assert len(stopped) == 8
    for ((_, found),) in stopped:
        assert found.is_truncated == (found.token_ids[-1] not in ends)
        assert not set(found.token_ids[:-1]) & set(ends)


class Relabeling(VLLMServerEngine):
    """After some copies the server loses the label of the weights, as by a restart."""

    def __init__(self, address, num_lost):
        super().__init__(address)
        self.num_lost = num_lost

    def _load(self, path):
        version = super()._load(path)
        if self._num_copies <= self.num_lost:
            self.client.call("/update_weight_version", {"new_version": "default"})
        return version


def test_samples_from_other_weights_are_drawn_again(engine, program, tiny_model):
    lm, requests = program.model(tiny_model, tied=True), program.make_requests()
    expected = tokens(program.sample(engine, lm, requests, SAMPLING))
    losing = Relabeling(engine.client.address, 2)
    with pytest.warns(UserWarning, match="8 samples of the vLLM server .* copy 2 and are drawn again"):
        assert tokens(program.sample(losing, lm, requests, SAMPLING)) == expected
    assert losing._num_copies == 3
    with pytest.raises(UserError, match="lost the weights 3 times in one call"):
        program.sample(Relabeling(engine.client.address, 3), lm, requests, SAMPLING)


def test_weights_of_another_program_end_the_run(engine, program, tiny_model):
    lm, requests = program.model(tiny_model, tied=True), program.make_requests()
    stream = engine.stream(lm, requests, SAMPLING, eos_ids=[256], pad_id=257)
    next(stream)
    VLLMServerEngine(engine.client.address).copy_weights(lm)
    with pytest.raises(UserError, match="Another program gave the vLLM server"):
        list(stream)


def test_a_server_that_does_not_fit_is_refused(engine, program, tiny_model):
    lm, requests = program.model(tiny_model, tied=True), program.make_requests()
    with pytest.raises(UserError, match=r"--hf-overrides '\{\"tie_word_embeddings\": false\}'"):
        engine.start(program.model(tiny_model, tied=False))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=r"--dtype .* must be bfloat16"):
        engine.start(lm)
    with pytest.raises(UserError, match="max_model_len of the vLLM server must be at least 513"):
        program.sample(engine, lm, requests, Sampling(313))
    with pytest.raises(UserError, match=r"temperature must be 0, or at least 0\.01 with VLLMServerEngine"):
        program.sample(engine, lm, requests, Sampling(3, temperature=0.001))
    lm.named_parameters = lambda **_: iter(list(torch.nn.Module.named_parameters(lm))[:-1])
    with pytest.raises(UserError, match="vLLM gets no weights for"):
        program.sample(engine, lm, requests, SAMPLING)


def test_two_ranks_sample_from_one_server(engine, program, repository, tiny_model, tmp_path):
    """Under ddp, where a thread samples the second batch, and under fsdp2, with shards."""
    program.save(tiny_model, str(tmp_path))
    two = ["--trainer.devices=2", f"--model.policy.name_or_path={tmp_path / 'tied'}"]
    runs = {
        "ddp": [*two, "--trainer.strategy=ddp", "--data.max_staleness=1"],
        "fsdp2": [*two, "--trainer.strategy=fsdp2"],
    }
    ranks = [str(FOLDER / "server_ranks_program.py"), str(tmp_path), engine.client.address, json.dumps(runs)]
    output, code = run_in_group([sys.executable, *TORCHRUN, *ranks], repository, 600, **ENVIRONMENT)
    assert code == 0, output
    for name in runs:
        found = [json.loads((tmp_path / name / f"{rank}.json").read_text()) for rank in (0, 1)]
        for moment, numbers in (("trained", [8, 5]), ("changed", [0, 8])):
            assert [len(rank[moment]["tokens"]) for rank in found] == numbers
            for rank in found:
                assert all(all(same) for same in rank[moment]["same"].values()), found
                assert rank[moment]["gap"] <= LARGEST_GAP
        first, second = (rank["trained"]["tokens"] for rank in found)
        assert second.items() <= first.items()  # a sample does not depend on its rank
        assert all(rank["no copy"]["gap"] > 1 for rank in found)


def test_a_restarted_server_gets_the_weights_again(engine, server, program, tiny_model):
    lm, requests = program.model(tiny_model, tied=True), program.make_requests()
    expected = tokens(program.sample(engine, lm, requests, SAMPLING))
    server.kill()
    server.start()
    with pytest.warns(UserWarning, match="no longer has the weights of copy 1, which it confirmed: it was restarted"):
        assert tokens(program.sample(engine, lm, requests, SAMPLING)) == expected
    with warnings.catch_warnings(action="error"):
        assert tokens(program.sample(engine, lm, requests, SAMPLING)) == expected


def test_a_server_killed_while_it_samples_ends_all_ranks(server, repository, tmp_path):
    """Within a minute, with a message; the run leaves no process, so no port, and no shared memory behind."""
    killed, shared = tmp_path / "killed", Path("/dev/shm")
    before = set(shared.iterdir())
    run = [*SFT_ON_TWO_RANKS, "--trainer.strategy=ddp", f"--trainer.default_root_dir={tmp_path}"]
    run += ["--data.engine=killing_engine.KillingEngine", f"--data.engine.address={server.address}"]
    run += [f"--data.engine.server={server.process.pid}", f"--data.engine.file={killed}"]
    text = run_until_all_end([sys.executable, *run], repository, tmp_path / "output", timeout=300, **ENVIRONMENT)
    assert killed.exists(), text
    assert time.time() - killed.stat().st_mtime < 70, "a minute, and ten seconds for the processes to end"
    assert f"The vLLM server at {server.address} does not answer for 40 s" in text
    assert "python -m vllm.entrypoints.openai.api_server" in text
    assert set(shared.iterdir()) <= before
