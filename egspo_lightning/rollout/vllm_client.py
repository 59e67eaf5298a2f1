"""HTTP client of a vLLM server on this node: sends requests in parallel, and reconnects for a while."""

import http.client
import json
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from egspo_lightning.errors import UserError

MAX_CONNECTIONS = 256
"""Requests that a rank has in flight; the server queues those that it has no room for."""
RECONNECT_S = 40.0
"""How long the client tries to reach a server that went away."""
PAUSE_S = 1.0
"""Time between two tries."""
CHECK_S = 10.0
"""After so long without a sample the client asks whether the server still answers."""
ANSWER_S = 60.0
"""How long an answer other than a sample may take: a busy server is slow, and one that hangs never answers."""
GENERATE = "/inference/v1/generate"
"""Takes and returns token ids; the server offers it with --enable-scale-out."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


class VLLMClient:
    """Sends JSON to a vLLM server and reads its JSON.

    Args:
        address: ``http://HOST:PORT`` on this node
        start_command: how to start the server on a ``{port}``, for error messages

    Raises:
        UserError: the address has another form, or is not on this node.
    """

    def __init__(self, address: str, start_command: str) -> None:
        parts = re.fullmatch(r"http://(?:\[([^/\]]+)\]|([^/:]+)):(\d{1,5})/?", address)
        if parts is None:
            raise UserError(f"data.engine.address must be http://HOST:PORT, got {address}.")
        self.address, self.host, self.port = address.rstrip("/"), parts[1] or parts[2], int(parts[3])
        if self.host not in LOCAL_HOSTS:
            raise UserError(
                f"data.engine.address must be on this node ({', '.join(LOCAL_HOSTS)}), got {address}. The weights go "
                "to the server through a file in shared memory, which a server on another node cannot read."
            )
        self.start_command = start_command.format(port=self.port)

    def call(
        self,
        path: str,
        body: Any = None,
        *,
        patience: float | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Answer of the server to one request, which is repeated if the server goes away.

        Args:
            path: of the request
            body: sent as JSON
            patience: seconds in which it is repeated; ``RECONNECT_S`` by default
            timeout: seconds that one answer may take; ``ANSWER_S`` by default

        Raises:
            UserError: the server does not answer, or refuses the request.
        """
        connection = self._connection(timeout or ANSWER_S)
        try:
            seconds = RECONNECT_S if patience is None else patience
            return self._ask(connection, path, body, seconds, threading.Event())
        finally:
            connection.close()

    def generate(self, bodies: Sequence[Any], check: Callable[[], Any]) -> Iterator[tuple[int, Any]]:
        """Yield number and answer of each request to ``GENERATE``, in the order in which they end.

        Threads wait for the answers. They are daemons, so that a server that hangs does not keep the process alive. If
        the caller stops early, the connections are closed, and the server drops the requests.

        Args:
            bodies: sent as JSON
            check: asks the server something, while no answer comes: a process that hangs closes no connection

        Raises:
            UserError: as for ``call``.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        stopped = threading.Event()

        def work(connection: http.client.HTTPConnection) -> None:
            while not stopped.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    break
                try:
                    answer = self._ask(connection, GENERATE, bodies[number], RECONNECT_S, stopped)
                except Exception as error:  # raised in the caller's thread
                    answer = error
                done.put((number, answer))
            connection.close()

        for number in range(len(bodies)):
            waiting.put(number)
        connections = [self._connection(None) for _ in bodies[:MAX_CONNECTIONS]]
        try:
            for connection in connections:
                threading.Thread(target=work, args=(connection,), name="vllm-client", daemon=True).start()
            for _ in bodies:
                number, answer = _next(done, check)
                if isinstance(answer, Exception):
                    raise answer
                yield number, answer
        finally:
            stopped.set()
            for connection in connections:
                _hang_up(connection)

    def _connection(self, timeout: float | None) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        path: str,
        body: Any,
        patience: float,
        stopped: threading.Event,
    ) -> Any:
        lost_since = None
        while True:
            try:
                status, answer = _exchange(connection, path, body)
                if status == 200:
                    return answer
                reason = f"{path} answers {status}: {_message(answer)}"
                if status < 500:
                    raise UserError(f"The vLLM server at {self.address} refuses a request. {reason}{self._remedy}")
            except (OSError, http.client.HTTPException) as error:
                patience = 0.0 if isinstance(error, TimeoutError) else patience  # it has waited already
                reason = f"{type(error).__name__}: {error}"
            connection.close()
            now = time.monotonic()
            lost_since = lost_since or now
            if now - lost_since >= patience or stopped.wait(PAUSE_S):
                tried = f" for {patience:g} s" if patience else ""
                raise UserError(f"The vLLM server at {self.address} does not answer{tried} ({reason}).{self._remedy}")

    @property
    def _remedy(self) -> str:
        return f" Start it on this node, with vLLM 0.32 or later:\n{self.start_command}"


def _next(done: "queue.SimpleQueue[tuple[int, Any]]", check: Callable[[], Any]) -> tuple[int, Any]:
    """The next answer; while none comes, the check is made again and again."""
    while True:
        try:
            return done.get(timeout=CHECK_S)
        except queue.Empty:
            check()


def _exchange(connection: http.client.HTTPConnection, path: str, body: Any) -> tuple[int, Any]:
    """Send one request; returns the status, and the JSON of the answer or its text."""
    text = None if body is None else json.dumps(body)
    connection.request("POST", path, text, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    is_json = (answer.getheader("Content-Type") or "").startswith("application/json")
    return answer.status, json.loads(content) if is_json else content.decode(errors="replace")


def _message(answer: Any) -> str:
    """The server's words on an error."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)[:400]


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """End a request of another thread, which then gets an error."""
    if connection.sock is not None:
        with suppress(OSError):  # the server has closed it
            connection.sock.shutdown(socket.SHUT_RDWR)
