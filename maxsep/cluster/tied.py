"""Python that ends when its parent ends: `python -m maxsep.cluster.tied PARENT ARGUMENTS`, PARENT being its process id.

A process in between, as the kernel's own word of a parent's death (PR_SET_PDEATHSIG) comes once for each of its
threads, and a second SIGTERM ends a run at once, unsaved. It passes SIGTERM on, and ends as its child has ended.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

POLL = 0.2  # seconds between two looks at the parent


def run(parent: int, arguments: Sequence[str]) -> int:
    """Runs Python with `arguments`; its status, negative where a signal has ended it."""
    received: list[int] = []  # signals that the child has not got yet: one may come before there is a child
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    child = subprocess.Popen([sys.executable, *arguments])
    told = False
    while True:
        try:
            return child.wait(POLL)
        except subprocess.TimeoutExpired:
            if os.getppid() != parent and not told:
                received.append(signal.SIGTERM)
                told = True
            while received:
                child.send_signal(received.pop())


if __name__ == "__main__":
    status = run(int(sys.argv[1]), sys.argv[2:])
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)
