"""What an agreement of many processes costs process 0: CPU seconds per round, and those that beats cost per second.

    python benchmarks/agreement.py --processes=16,128,1024 --rounds=20

With --lists they agree on the list of what all have said, else on what process 0 makes of it.

The other processes are connections of one more process, on the loopback, which answers and beats for all of them.
"""

import argparse
import json
import resource
import selectors
import socket
import subprocess
import sys
import time

from maxsep.cluster.connection import Connection
from maxsep.cluster.job import BEAT, Job
from maxsep.cluster.process import Process
from maxsep.cluster.rollcall import Member

DOING = {"phase": "training", "step": 1, "waiting": False, "seconds": 0.0, "limit": 0.0}
QUIET = 4.0  # seconds in which beats alone are counted


def peers(port: int, count: int) -> None:
    """`count` connections: each says what it does as a process does, and enters a round when the last has ended."""
    selector, ended = selectors.DefaultSelector(), 0
    for _ in range(count):
        link = socket.create_connection(("localhost", port))
        selector.register(link, selectors.EVENT_READ, [b"", 0])
    links = [key.fileobj for key in selector.get_map().values()]
    due = 0.0
    while ended < count:
        now = time.monotonic()
        if now > due:
            due = now + BEAT
            for link in links:
                link.sendall(_line(doing=DOING))
        for key, _ in selector.select(0.05):
            came = key.fileobj.recv(1 << 16)
            *lines, key.data[0] = (key.data[0] + came).split(b"\n")
            for text in lines:
                if b'"agreed"' in text or b'"begin"' in text:
                    key.data[1] += 1
                    key.fileobj.sendall(_line(round=key.data[1], value=[None, False], doing=DOING))
            if not came:
                selector.unregister(key.fileobj)
                links.remove(key.fileobj)
                ended += 1


def _line(**message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def measured(count: int, rounds: int, reduced) -> dict:
    """CPU seconds of this process: of a round, and of a second in which there is none."""
    with socket.create_server(("localhost", 0), backlog=count) as listener:
        port = listener.getsockname()[1]
        command = [sys.executable, __file__, f"--port={port}", f"--processes={count - 1}"]
        child = subprocess.Popen(command)
        connections = [Connection(listener.accept()[0]) for _ in range(count - 1)]
    members = [Member(i, count, "localhost", i, None, {}) for i in range(count)]
    job = Job(members, Process(0, count), connections, heartbeat=600.0, watchdog=600.0)
    began = time.process_time()
    time.sleep(QUIET)
    quiet = (time.process_time() - began) / QUIET
    for connection in connections:
        connection.send(begin=True)
    took, cpu = time.monotonic(), time.process_time()
    for _ in range(rounds):
        job.agree([None, False], **({} if reduced is None else {"reduced": reduced}))
    took, cpu = time.monotonic() - took, time.process_time() - cpu
    child.kill()
    return {
        "processes": count,
        "cpu_seconds_per_round": round(cpu / rounds, 5),
        "seconds_per_round": round(took / rounds, 5),
        "cpu_seconds_per_second_of_beats": round(quiet, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="16,128,1024", help="numbers of processes, process 0 among them")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--lists", action="store_true", help="agree on lists of all values")
    parser.add_argument("--port", type=int, help="internal: be the other processes")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if args.port:
        peers(args.port, int(args.processes))
        return
    for count in args.processes.split(","):  # a process each: the threads of a job end with it
        if "," in args.processes:
            more = ["--lists"] if args.lists else []
            subprocess.run(
                [sys.executable, __file__, f"--processes={count}", f"--rounds={args.rounds}", *more], check=True
            )
        else:
            reduced = None if args.lists else lambda heard: all(ended for _, ended in heard)
            print(json.dumps(measured(int(count), args.rounds, reduced)), flush=True)


if __name__ == "__main__":
    main()
