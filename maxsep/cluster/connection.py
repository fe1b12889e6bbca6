"""A connection between two processes of a job: JSON lines over TCP."""

import contextlib
import json
import socket
import threading


def line(**message) -> bytes:
    """A message as it is sent."""
    return json.dumps(message).encode() + b"\n"


class Connection:
    """One end of it. Any thread may send; one receives."""

    def __init__(self, link: socket.socket):
        self.link = link
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # messages are small, and waited for
        self._lock, self._lines = threading.Lock(), link.makefile("rb")

    def send(self, **message) -> None:
        """Sends a message. Where the other is gone it is dropped: whoever receives finds that out."""
        self.send_line(line(**message))

    def send_line(self, encoded: bytes) -> None:
        """Sends what `line` has made: once, where many get the same."""
        with self._lock, contextlib.suppress(OSError):
            self.link.sendall(encoded)

    def receive(self) -> dict | None:
        """The next message; None where the other is gone, or speaks something else."""
        try:
            line = self._lines.readline()
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self.link.close()
