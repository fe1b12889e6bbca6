"""The roll call: the processes of a job find each other, and whether they were started alike, before JAX starts.

JAX would wait for a missing process for minutes and then abort in C++, without saying which.
"""

import errno
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

from maxsep.cluster.connection import Connection
from maxsep.cluster.process import Process
from maxsep.config import ConfigError, cli

RETRY = 0.2  # seconds between two attempts to reach process 0
LATE = 3.0  # seconds in which the others still come, to hear why there will be no job
INTRODUCTION = 5.0  # seconds that a connection may take to say who it is


@dataclass(frozen=True)
class Member:
    """A process of a job."""

    index: int
    count: int  # of the job's processes, as it was told
    host: str
    pid: int
    gpus: str | None  # that it may use, as CUDA_VISIBLE_DEVICES says
    facts: Mapping[str, str]  # what must be the same everywhere, by name
    job: str = ""  # Process.job

    @classmethod
    def of(cls, process: Process, facts: Mapping[str, str] = MappingProxyType({})) -> "Member":
        """This process."""
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        return cls(process.index, process.count, socket.gethostname(), os.getpid(), gpus, facts, process.job)

    def __str__(self) -> str:
        return f"process {self.index} (pid {self.pid} on {self.host})"


def call(process: Process, facts: Mapping[str, str], seconds: float) -> tuple[list[Member], list[Connection]]:
    """The job's members, by number, and connections: of process 0 one to each other member, of another to process 0.

    Args:
        process: this one.
        facts: what must be the same everywhere, by name.
        seconds: until those that have not answered are missing.

    Raises:
        cli.Exit: some are missing (RESTART: they may come another time), or were started otherwise (USER_ERROR);
            without a message where process 0 prints it on the same host.
        ConfigError: process 0 cannot listen.
    """
    me = Member.of(process, facts)
    return (_answer if process.index else _gather)(process, me, seconds)


def described(members: list[Member]) -> str:
    """Who is where, in a line."""
    hosts: dict[str, list[Member]] = {}
    for member in members:
        hosts.setdefault(member.host, []).append(member)
    of_hosts = (f"{host}: " + ", ".join(f"{m.index} (pid {m.pid})" for m in found) for host, found in hosts.items())
    return f"{len(members)} processes on {len(hosts)} host{'s'[: len(hosts) > 1]}; " + "; ".join(of_hosts)


def _gather(process: Process, me: Member, seconds: float) -> tuple[list[Member], list[Connection]]:
    end, found = time.monotonic() + seconds, [(me, None)]
    wrong: cli.Exit | None = None
    with _listener(process) as listener:
        while len(found) < process.count:
            listener.settimeout(max(0.001, end - time.monotonic()))
            try:
                connection = Connection(listener.accept()[0])
            except TimeoutError:
                missing = _missing([member for member, _ in found], seconds)
                wrong = wrong or cli.Exit(cli.RESTART, missing)
                break
            if (member := _introduced(connection)) is None:
                continue
            if member.job != me.job:
                _send_away(connection, member, me)
                continue
            if wrong is None and (differs := _differs(member, [other for other, _ in found])):
                wrong = cli.Exit(cli.USER_ERROR, differs)
                end = min(end, time.monotonic() + LATE)
            found.append((member, connection))
    found.sort(key=lambda pair: pair[0].index)
    members = [member for member, _ in found]
    connections = [connection for _, connection in found if connection is not None]
    members = [replace(member, facts={}) for member in members]  # which are many, and no longer needed
    refused = wrong and {"status": wrong.status, "why": str(wrong)}
    for connection in connections:
        connection.send(refused=refused, members=[asdict(member) for member in members])
    if wrong is not None:
        for connection in connections:
            connection.close()
        raise wrong
    return members, connections


def _listener(process: Process) -> socket.socket:
    """The coordinator's port, on all of this machine's addresses."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(
            ("", process.port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=process.count
        )
    except OSError as e:
        got = f"cannot listen on port {process.port} of {socket.gethostname()} ({e.strerror})"
        line = f"--coordinator: {got}; takes a free port of the machine of process 0"
        if process.job and e.errno == errno.EADDRINUSE:  # nobody has chosen it: it may be free another time
            raise cli.Exit(cli.RESTART, f"{line}; this one follows from {process.job}") from None
        raise ConfigError(line) from None


def _send_away(connection: Connection, member: Member, me: Member) -> None:
    """Tells a process of another job, whose name has led it to the same port."""
    own, other = member.job or "a job without a name", me.job or "a job without a name"
    why = f"--coordinator: {member} of {own} got the port of {me} of {other}; takes that of its own process 0"
    connection.send(refused={"status": cli.RESTART, "why": why}, members=[])
    connection.close()


def _introduced(connection: Connection) -> Member | None:
    """Who is at the other end; None, and the connection closed, where it is no process of a job."""
    connection.link.settimeout(INTRODUCTION)
    try:
        member = Member(**connection.receive() or {})
    except TypeError:
        connection.close()
        return None
    connection.link.settimeout(None)
    return member


def _differs(member: Member, others: list[Member]) -> str | None:
    """Why this member cannot be one of the others' job."""
    first = others[0]
    if member.count != first.count:
        return f"--num_processes: got {member.count} in {member}, {first.count} in {first}; takes the same in all"
    for other in others:
        if other.index == member.index:
            return f"--process_id: got {member.index} in two processes, {other} and {member}; takes each number once"
    for name in sorted(first.facts.keys() | member.facts.keys()):
        here, there = first.facts.get(name), member.facts.get(name)
        if here != there:
            return f"{name}: got {there} in {member}, {here} in {first}; takes the same in all"
    return None


def _missing(members: list[Member], seconds: float) -> str:
    numbers = sorted(set(range(members[0].count)) - {member.index for member in members})
    which = f"process {numbers[0]}" if len(numbers) == 1 else f"processes {', '.join(map(str, numbers))}"
    return (
        f"--num_processes: got {members[0].count}, but {which} did not come within {seconds:g} s (--join_seconds); "
        f"here are {', '.join(map(str, members))}"
    )


def _answer(process: Process, me: Member, seconds: float) -> tuple[list[Member], list[Connection]]:
    end, reason = time.monotonic() + seconds, "no answer"
    while (left := end - time.monotonic()) > 0:  # process 0 may come later
        try:
            connection = Connection(socket.create_connection((process.host, process.port), left))
        except OSError as e:
            reason = e.strerror or str(e)
            time.sleep(RETRY)
            continue
        connection.send(**asdict(me))
        connection.link.settimeout(max(0.001, end - time.monotonic() + RETRY))  # process 0 says who is missing
        reply = connection.receive()
        if reply is None or "members" not in reply:
            reason = "something else answers there"
            connection.close()
            time.sleep(RETRY)
            continue
        if (refused := reply["refused"]) is not None:
            connection.close()
            told = any(member["host"] == me.host for member in reply["members"][:1])
            raise cli.Exit(refused["status"], "" if told else refused["why"])
        connection.link.settimeout(None)
        return [Member(**member) for member in reply["members"]], [connection]
    raise cli.Exit(
        cli.RESTART,
        f"--coordinator: got {process.address}, where process 0 was not reached within {seconds:g} s (--join_seconds): "
        f"{reason}; takes the HOST:PORT of process 0",
    )
