"""Several processes of train.py on this machine, also with faults, and how they end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kill

FAULTY = Path(__file__).with_name("faulty.py")
# Most of a small run's time is LLVM's: it is told to optimise nothing.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_COMPILATION_CACHE_DIR": ""}

# Proxies that lead nowhere: processes of a job never go through one.
PROXIES = dict.fromkeys(("http_proxy", "HTTPS_PROXY", "grpc_proxy"), "http://127.0.0.1:9")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def running(text: str) -> list[int]:
    """The processes of this machine whose command line has `text`, oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


class Processes:
    """Processes of one job; a context, after which none is left.

    Args:
        workdir: of the run; what they print goes to files beside it.
        count: of the processes.
        arguments: flags of train.py.
        fault: the number of a process, and the arguments of faulty.py for it.
    """

    def __init__(self, workdir: Path, count: int, *arguments: str, fault=(None,), environment=()):
        self.workdir, port, stamp = workdir, free_port(), time.monotonic_ns()
        job = (f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--workdir={workdir}")
        self.outputs = [workdir.with_name(f"{workdir.name}.{stamp}.{index}.txt") for index in range(count)]
        self.children = []
        for index, output in enumerate(self.outputs):
            program = [kill.TRAIN] if index != fault[0] else [FAULTY, *fault[1:]]
            command = [sys.executable, *map(str, program), *job, f"--process_id={index}", *arguments]
            with output.open("w") as file:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=kill.environment() | QUICK | PROXIES | dict(environment),
                )
            self.children.append(child)

    def printed(self, index: int = 0) -> str:
        return self.outputs[index].read_text()

    def reach(self, text: str, index: int = 0) -> None:
        """Waits until a process has printed `text`."""
        end = time.monotonic() + kill.LIMIT
        while text not in self.printed(index):
            assert time.monotonic() < end and self.children[index].poll() is None, self.all_printed()
            time.sleep(0.02)

    def ended(self, but: int | None = None, limit: float = kill.LIMIT) -> list[int | None]:
        """The exit statuses; process `but` need not end."""
        for index, child in enumerate(self.children):
            if index != but:
                try:
                    child.wait(limit)
                except subprocess.TimeoutExpired:
                    raise AssertionError(f"process {index} did not end: {self.all_printed()}") from None
        return [child.poll() for child in self.children]

    def all_printed(self) -> str:
        return "\n".join(f"--- process {i}\n{self.printed(i)}" for i in range(len(self.children)))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exc) -> None:
        for child in self.children:
            if child.poll() is None:
                os.kill(child.pid, signal.SIGKILL)
                child.wait()


def train(workdir: Path, count: int, *arguments: str, **options) -> str:
    """Trains to the end; what process 0 printed."""
    with Processes(workdir, count, *arguments, **options) as processes:
        assert processes.ended() == [0] * count, processes.all_printed()
        return processes.printed()
