"""Starts several processes of one command on this machine, and ends them together.

As in `python -m maxsep.launch --processes=4 -- train.py --workdir=runs/four`: what comes after -- is for Python, also
infer.py or -m maxsep.bench train. Without accelerators each process simulates its part of the mesh's devices; with GPUs
each takes one. Standard output is process 0's, which prints for all; a line of standard error has its process's number
before it. SIGTERM, SIGHUP and Ctrl-C are passed on. With --restarts a job that has lost a process starts again, and
resumes from its latest checkpoint.
"""

import signal
import sys
from pathlib import Path

from absl import flags

from maxsep.cluster import group, process
from maxsep.cluster.signals import stopping
from maxsep.config import ConfigError, cli


def define(values: flags.FlagValues) -> None:
    def integer(name, default, least, text):
        flags.DEFINE_integer(name, default, text, lower_bound=least, upper_bound=1024, flag_values=values)

    integer("processes", None, 1, "processes to start")
    integer("restarts", 0, 0, "times to start again after a process was lost or crashed")


def main(args: cli.Args, command: list[str]) -> None:
    if args.flags.processes is None:
        raise ConfigError("--processes: none given; takes how many to start")
    process.refuse_several("launch, which starts them itself,")
    if not command:
        raise ConfigError("command: none given; takes it after --, as `launch --processes=4 -- train.py`")
    if not command[0].startswith("-") and not Path(command[0]).is_file():
        raise ConfigError(f"command: got {command[0]}, which is no file; takes a Python program, as train.py")
    signals, caught = [], stopping()
    for restart in range(args.flags.restarts + 1):
        job = group.Group(command, args.flags.processes)

        def passed_on(number: int, frame, job=job) -> None:
            signals.append(number)
            job.signal(number)

        for number in caught:
            signal.signal(number, passed_on)
        statuses = job.ended()
        status = group.status(statuses)
        if status == cli.RESTART:
            print(f"launch: {group.described(statuses)}", file=sys.stderr, flush=True)
        if status != cli.RESTART or signals or restart == args.flags.restarts:
            break
        print(f"launch: start {restart + 2} of {args.flags.restarts + 1}", file=sys.stderr, flush=True)
    if status:
        raise cli.Exit(status, "")


def run(argv: list[str]) -> int:
    """`main` with a command line whose own flags end at --, or else where the command begins."""
    begins = (number for number, word in enumerate(argv) if number and (word in ("--", "-m") or word.endswith(".py")))
    end = next(begins, len(argv))
    command = argv[end + 1 :] if argv[end : end + 1] == ["--"] else argv[end:]
    return cli.run(lambda args: main(args, command), define, __doc__, argv=argv[:end])


if __name__ == "__main__":
    sys.exit(run(sys.argv))
