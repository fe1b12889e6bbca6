"""A command of ours as a child process: its lines go to a log, a signal to stop it is passed on."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from maxsep.cluster.signals import Stop

CLEAR = "\x1b[2K"  # a terminal's line


def run(command: Sequence[str], log: Path | None, environment: dict[str, str], stop: Stop, shown: bool = True) -> int:
    """Runs Python with the arguments `command` until it ends, and returns its status.

    The command and its output go to `log`; if it is `shown`, its last line goes to a terminal too. Without a log, what
    it prints goes to this program's standard error. If `stop` is asked, the child gets SIGTERM, once.
    """
    with nullcontext(sys.stderr) if log is None else log.open("w", encoding="utf-8") as output:
        if log is not None:
            print("$ python", shlex.join(command), file=output, flush=True)
        child = subprocess.Popen(
            [sys.executable, "-m", "maxsep.cluster.tied", str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,  # a terminal's Ctrl-C comes to this program alone
        )
    told, terminal = False, shown and log is not None and sys.stdout.isatty()
    try:
        while child.poll() is None:
            if stop.asked and not told:
                child.send_signal(signal.SIGTERM)
                told = True
            if terminal:
                print(f"\r{CLEAR}{last(log)[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
            time.sleep(0.1)
    finally:
        if terminal:
            print(f"\r{CLEAR}", end="", flush=True)
        if child.poll() is None:
            child.terminate()
            child.wait()
    return child.returncode


def why(log: Path, status: int) -> str:
    """Why a child failed that ended with `status`: its line of error, else the signal that killed it, or its last line.

    The last line is that of a traceback, but of a child that was killed only what it happened to do.
    """
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = errors[-1] if errors else next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    if status >= 0:
        return f"{said} (status {status})"
    killed = f"killed by {signal.Signals(-status).name}"
    if -status == signal.SIGKILL:
        killed += " (out of memory?)"
    return f"{said} ({killed})" if errors else f"{killed}; the last that it said: {said}"


def shell_status(status: int) -> int:
    """The status of a child as a shell tells it, also of one that a signal has killed."""
    return 128 - status if status < 0 else status


def last(log: Path) -> str:
    """The last whole line of a log."""
    with log.open("rb") as f:
        f.seek(max(0, log.stat().st_size - 4096))
        lines = f.read().decode(errors="replace").splitlines()
    return lines[-1] if lines else ""
