"""The processes of a job as children of one program on this machine: started, listened to, ended together."""

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from maxsep.config import cli

LINGER = 15.0  # seconds that the others may take to end when one has
KILL = 5.0  # and then to end after SIGTERM
PR_SET_PDEATHSIG = 1
FINAL = (cli.USER_ERROR, cli.NONFINITE, cli.SAVE_FAILED, cli.STOPPED)  # statuses that another start would not change


class Group:
    """`count` processes of one command.

    Standard input and output are process 0's; a line of standard error has its process's number before it.

    Args:
        command: arguments for Python.
        count: of processes, from 1.
    """

    def __init__(self, command: Sequence[str], count: int):
        port = _free_port()
        self._said: set[str] = set()
        self._unfinished = [b""] * count  # lines
        self.children = [self._child(command, index, count, port) for index in range(count)]
        # No thread reads: a dead parent's signal comes once for each of its threads, and two signals are too many.
        self._errors = selectors.DefaultSelector()
        for index, child in enumerate(self.children):
            self._errors.register(child.stderr, selectors.EVENT_READ, index)

    def _child(self, command: Sequence[str], index: int, count: int, port: int) -> subprocess.Popen:
        own = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": index}
        # A group of its own in a terminal may not read from it.
        reads = index == 0 and not sys.stdin.isatty()
        return subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {name: str(value) for name, value in own.items()},
            stdin=None if reads else subprocess.DEVNULL,
            stdout=None if index == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C comes to this program alone, which passes it on once
            preexec_fn=_end_with_parent,
        )

    def signal(self, number: int) -> None:
        """Passes a signal on to all."""
        for child in self.children:
            child.send_signal(number)

    def ended(self) -> list[int]:
        """The exit statuses, by process, when all have ended: those who do not end with the first are, by a signal."""
        ended_by: dict[subprocess.Popen, int] = {}
        while all(child.poll() is None for child in self.children):
            self._listen()
        for number, seconds in ((None, LINGER), (signal.SIGTERM, KILL), (signal.SIGKILL, float("inf"))):
            late = [child for child in self.children if number is not None and child.poll() is None]
            for child in late:
                ended_by[child] = number
                child.send_signal(number)
                child.send_signal(signal.SIGCONT)
            end = time.monotonic() + seconds
            while any(child.poll() is None for child in self.children) and time.monotonic() < end:
                self._listen()
        while self._listen(0):  # what is left in the pipes
            pass
        self._errors.close()
        for child in self.children:
            child.stderr.close()
        return [-ended_by[child] if child in ended_by else child.returncode for child in self.children]

    def _listen(self, seconds: float = 0.05) -> bool:
        """Passes on what processes say on standard error, for so long; whether one said something."""
        if not self._errors.get_map():
            time.sleep(seconds)
            return False
        found = self._errors.select(seconds)
        for key, _ in found:
            text = os.read(key.fd, 1 << 16)
            if not text:
                self._errors.unregister(key.fileobj)
                text = b"\n" if self._unfinished[key.data] else b""
            *lines, self._unfinished[key.data] = (self._unfinished[key.data] + text).split(b"\n")
            for line in lines:
                self._tell(key.data, line.decode(errors="replace"))
        return bool(found)

    def _tell(self, index: int, line: str) -> None:
        """Prints a line of a process; what is wrong with all, once."""
        if line.startswith("error: "):
            if line in self._said:
                return
            self._said.add(line)
        with contextlib.suppress(OSError):
            print(f"[{index}] {line}", file=sys.stderr, flush=True)


def status(statuses: Sequence[int]) -> int:
    """The exit status of a job whose processes ended with these; RESTART where one was killed or had crashed."""
    told = [status for status in statuses if status in FINAL]
    if told:
        return told[0]
    return cli.RESTART if any(statuses) else cli.DONE


def described(statuses: Sequence[int]) -> str:
    """How processes ended that did not end well, for people."""

    def how(status: int) -> str:
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    return "; ".join(f"process {index} {how(status)}" for index, status in enumerate(statuses) if status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _end_with_parent() -> None:
    """In a child: SIGTERM when its parent is killed (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
