"""A command in a job of several processes: it joins the others, and whatever ends it ends them all."""

import contextlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from absl import flags

from maxsep.cluster import process, rollcall
from maxsep.cluster.job import ALONE, End, Job
from maxsep.cluster.signals import interrupting, stopping
from maxsep.config import cli, fields, streams

ALIKE = ("maxsep", "jax", "jaxlib")  # packages whose versions have to be the same in all processes


def define(values: flags.FlagValues) -> None:
    """The flags of a command that runs on several processes."""
    process.define(values)
    flags.DEFINE_float(
        "join_seconds", 300.0, "seconds to wait for the other processes", lower_bound=0.001, flag_values=values
    )


@contextlib.contextmanager
def joined(args: cli.Args, folder: Path | None) -> Iterator[Job]:
    """The job of this process, of one process where nothing says otherwise.

    In a job of several, standard output is process 0's alone, and where the context ends the program does: when all
    have come to their end, or when one has failed, with its error.

    Args:
        args: of the command, which have to be the same in all processes.
        folder: of the run, where stacks are written; None: nowhere.

    Raises:
        ConfigError, cli.Exit: the processes do not make a job.
    """
    this = process.this(args.flags)
    if this.count == 1:
        yield ALONE
        return
    joining = args.flags.join_seconds
    members, connections = rollcall.call(this, _facts(args, folder), joining)
    train = args.config.train
    with interrupting():
        job = Job(members, this, connections, train.heartbeat_seconds, train.watchdog_seconds, folder, joining)
        sys.stdout = _output(job.first)
        print(rollcall.described(members), flush=True)
        error = None
        try:
            yield job
            job.at("ending")
        except KeyboardInterrupt as e:
            what = f"stopped while {job.doing.phase}; the same command resumes from what is saved"
            error = cli.Exit(cli.STOPPED, f"{e or 'SIGINT'}: {what}")
        except Exception as e:
            error = e
    _exit(job, error)


def _output(first: bool) -> streams.Output:
    """Standard output of the program; to that of the libraries below it, which tell of each connection, nobody listens.

    Nor to what other processes than the first say.
    """
    nowhere, number = os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
    ours = os.dup(number if first else nowhere)
    os.dup2(nowhere, number)
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    return streams.Output(open(ours, "w", buffering=1, encoding=encoding, errors=errors))


def _exit(job: Job, error: Exception | None) -> None:
    """Ends the process. Without Python's way out: JAX would wait there for processes that do not come."""
    for number in stopping():
        signal.signal(number, signal.SIG_IGN)
    status, message = cli.outcome(error) if error else (cli.DONE, "")
    if status == cli.CRASHED:
        message += f", in {job.doing}"
    end, told = job.leave(End(status, message))
    with contextlib.suppress(OSError):  # nobody listens
        if not told and error is not None:
            cli.answer(error)
        if not told and end.message and (error is None or status == cli.CRASHED):
            line = f"{job.members[job.index]}: {message}" if error else end.message
            print("error:", line, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(end.status)


def _facts(args: cli.Args, folder: Path | None) -> dict[str, str]:
    """What has to be the same in all processes, by name."""
    own = (*process.FLAGS, "join_seconds", "workdir", "folder")  # a folder may be given relative to another
    names = [name for name in args.flags if name not in own and not name.startswith("config")]
    given = {f"--{name}": str(args.flags[name].value) for name in names}
    settings = {field.path: repr(attrgetter(field.path)(args.config)) for field in fields()}
    versions = {package: importlib.metadata.version(package) for package in ALIKE}
    return settings | given | {"--workdir": str(folder), "command": str(args.command)} | versions
