"""Keeps JAX's connections to process 0 open for a while when it dies.

JAX's client aborts in C++ as soon as its connection to the coordinator closes, a tenth of a second after the
coordinator's death: often before the others could say who is gone. A child of process 0 holds the same sockets, so that
they close only when the others have ended in order. Linux only; elsewhere nothing is held.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ESTABLISHED = "01"
# Holds on while its standard input is open, and then until the others have hung up, or for some seconds.
CODE = """
import select, sys, time
limit, *sockets = map(float, sys.argv[1:])
sys.stdin.read()
end, poll, held = time.monotonic() + limit, select.poll(), len(sockets)
for number in sockets:
    poll.register(int(number), select.POLLRDHUP)
while held and time.monotonic() < end:
    for number, _ in poll.poll(100):
        poll.unregister(number)
        held -= 1
"""


def hold(port: int, but: list[int], seconds: float) -> subprocess.Popen | None:
    """Starts the child, which holds on as long as what is returned exists.

    Args:
        port: that JAX's coordinator listens on.
        but: file descriptors that are not to be held: connections of our own, whose end is to be seen.
        seconds: how long to hold on after this process, at most.
    """
    if not Path("/proc/self/net/tcp").exists():
        return None
    connections = _connections(port)
    sockets = [number for number, inode in _sockets().items() if inode in connections and number not in but]
    return subprocess.Popen(
        [sys.executable, "-IS", "-c", CODE, str(seconds), *map(str, sockets)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=sockets,
        start_new_session=True,  # a terminal's signals are not for it
    )


def _sockets() -> dict[int, str]:
    """This process's sockets: inodes by file descriptor."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/self/fd/{name}"))
        except OSError:  # closed meanwhile
            continue
        if match:
            found[int(name)] = match[1]
    return found


def _connections(port: int) -> set[str]:
    """Inodes of the connections to a local port."""
    tables = [Path("/proc/self/net", name) for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return {line[9] for line in lines if line[3] == ESTABLISHED and int(line[1].rpartition(":")[2], 16) == port}
