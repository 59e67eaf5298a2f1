"""Frames on the sockets between the grader and its workers: a length of four bytes, then JSON."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!I")


def send_frame(sock: socket.socket, message: Any) -> None:
    """Send one message.

    Raises:
        OSError: the other end is gone.
    """
    payload = json.dumps(message).encode("ascii")
    sock.sendall(_LENGTH.pack(len(payload)) + payload)


def receive_frame(sock: socket.socket) -> Any:
    """The next message; None where the other end is gone, also in the middle of one."""
    header = _receive(sock, _LENGTH.size)
    payload = _receive(sock, _LENGTH.unpack(header)[0]) if header is not None else None
    return None if payload is None else json.loads(payload)


def _receive(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        try:
            chunk = sock.recv(size - len(data))
        except OSError:
            return None
        if not chunk:
            return None
        data += chunk
    return bytes(data)
