"""VLLMServerEngine without vLLM: refused settings, and servers that do not answer. tests/vllm runs a real server."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from egspo_lightning.cli.main import run
from egspo_lightning.errors import UserError
from egspo_lightning.rollout import vllm_client
from egspo_lightning.rollout.vllm_client import VLLMClient
from egspo_lightning.rollout.vllm_server import VLLMServerEngine, require_one_node


@pytest.fixture
def port():
    """A port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


@pytest.mark.parametrize("address", ["http://10.0.0.7:8000", "http://gpu-2.cluster:8000"])
def test_server_on_another_node_is_refused_with_the_reason(address):
    with pytest.raises(UserError, match=rf"must be on this node .*got {address}\. .*file in shared memory"):
        VLLMServerEngine(address)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8000", "https://127.0.0.1:8000", "http://localhost", "http://[::1]:1/v1", "http://::1:1"]
)
def test_address_of_another_form_is_refused(address):
    with pytest.raises(UserError, match=r"data\.engine\.address must be http://HOST:PORT, got"):
        VLLMServerEngine(address)


def test_ranks_on_several_nodes_are_refused():
    require_one_node(["a", "a"])
    with pytest.raises(UserError, match=r"the ranks are on several nodes \(a, b\)"):
        require_one_node(["b", "a", "b"])


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_other_transport_is_refused_with_the_reason(transport):
    with pytest.raises(UserError, match=rf"transport must be shared_memory, got {transport}\. .*not implemented"):
        VLLMServerEngine(transport=transport)


def test_run_without_its_server_ends_before_training_and_says_how_to_start_one(monkeypatch, repository, port, tmp_path):
    monkeypatch.chdir(repository)
    arguments = [
        "fit",
        "--config=configs/quickstart.yaml",
        "--data.engine=VLLMServerEngine",
        f"--data.engine.address=http://127.0.0.1:{port}",
        f"--trainer.default_root_dir={tmp_path}",
        "--data.demonstrations.init_args.num_demonstrations=32",
        "--data.benchmarks=null",
    ]
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port} does not answer \(ConnectionRefused(.|\n)*api_server"):
        run(arguments)


class Answering(BaseHTTPRequestHandler):
    """Answers every request with its own JSON; the first ones get an error of the server."""

    num_errors = 0

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        is_error, type(self).num_errors = self.num_errors > 0, self.num_errors - 1
        text = json.dumps({"error": {"message": "the engine died"}}).encode() if is_error else body
        self.send_response(500 if is_error else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def serve(port, num_errors=0, delay=0.0):
    """Serve in a thread, after a delay in seconds."""

    def work():
        time.sleep(delay)
        handler = type("Handler", (Answering,), {"num_errors": num_errors})
        with HTTPServer(("127.0.0.1", port), handler) as server:
            server.timeout = 5
            for _ in range(8 + num_errors):
                server.handle_request()

    threading.Thread(target=work, daemon=True).start()


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_client_reconnects_to_a_server_that_comes_back(free_port):
    client = VLLMClient(f"http://127.0.0.1:{free_port}", "")
    serve(free_port, num_errors=1, delay=1.0)
    found = dict(client.generate([{"number": number} for number in range(3)], client.call))
    assert found == {number: {"number": number} for number in range(3)}


def test_client_gives_up_after_a_while_and_names_the_servers_error(monkeypatch, free_port):
    monkeypatch.setattr(vllm_client, "RECONNECT_S", 1.0)
    serve(free_port, num_errors=100)
    with pytest.raises(UserError, match=r"does not answer for 1 s \(/x answers 500: the engine died\)\. Start it"):
        VLLMClient(f"http://127.0.0.1:{free_port}", "COMMAND").call("/x", {})


def test_client_notices_a_server_that_hangs(monkeypatch):
    """It accepts connections, and answers nothing."""
    monkeypatch.setattr(vllm_client, "CHECK_S", 0.2)
    monkeypatch.setattr(vllm_client, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        client = VLLMClient(f"http://127.0.0.1:{hanging.getsockname()[1]}", "COMMAND")
        with pytest.raises(UserError, match=r"does not answer \(TimeoutError"):
            list(client.generate([{}, {}], lambda: client.call("/x")))
