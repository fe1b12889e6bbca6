"""The processes of a job, connected: they agree on values, and end together when one of them is lost.

JAX alone lets a job hang where a process raises or is stuck, and ends it by an abort in C++ where one dies. So every
process tells the hub, process 0, several times a second what it is doing, over a connection of our own; and the hub
tells the others that it lives, what all agree on, and why the job ends.

A thread sends, and one for each connection receives. They end the process with `os._exit`, whatever its main thread
waits for.
"""

import contextlib
import faulthandler
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from maxsep.cluster.connection import Connection, line
from maxsep.cluster.process import Process
from maxsep.cluster.rollcall import Member
from maxsep.config import cli

BEAT = 0.5  # seconds from one beat to the next
GRACE = 2.0  # seconds in which one's failure may turn out to be another one's death, or everybody's
PAUSE = 5.0  # seconds by which a beat may be late before it is this process that was held
HELD = 4  # times the heartbeat that a process may be silent while it compiles, which may hold the interpreter
WATCHED = (
    "training",
    "evaluating",
    "saving",
    "generating",
    "scoring",
    "ending",
)  # phases in which something has to come to an end


@dataclass
class Doing:
    """What the main thread of a process is at."""

    phase: str = "starting"
    step: int = 0
    waiting: bool = False  # for devices, or for other processes
    seconds: float = 0.0  # since phase or step was last told
    limit: float = 0.0  # seconds in which it has to end, where these are more than the watchdog's

    def __str__(self) -> str:
        return f"{self.phase}, after step {self.step}" if self.phase in WATCHED else self.phase


@dataclass(frozen=True)
class End:
    """How a process ends, or all do."""

    status: int
    message: str  # "" where there is nothing to say
    together: bool = False  # all processes come to their end by themselves


@dataclass
class Peer:
    """Another process: at the hub each other one, at another one the hub."""

    member: Member
    connection: Connection
    heard: float = field(default_factory=time.monotonic)
    doing: Doing = field(default_factory=Doing)
    left: End | None = None


class Job:
    """This process in its job. Of one process, all of this is nothing.

    Args:
        members: all of them, by number.
        process: this one.
        connections: as `rollcall.call` returns them.
        heartbeat: seconds without a word after which another process counts as lost.
        watchdog: seconds in which no process ends a step, a batch of an evaluation or a save, after which the job ends.
        folder: where stacks are written, if it is there.
        joining: seconds that processes may take to meet.
    """

    def __init__(
        self,
        members: Sequence[Member],
        process: Process,
        connections: Sequence[Connection] = (),
        heartbeat: float = 0.0,
        watchdog: float = 0.0,
        folder: Path | None = None,
        joining: float = 0.0,
    ):
        self.members, self.process, self.folder = members, process, folder
        self.heartbeat, self.watchdog, self.joining = heartbeat, watchdog, joining
        others = members[1:] if self.first else members[:1]
        self.peers = [Peer(member, connection) for member, connection in zip(others, connections, strict=True)]
        self.holder: subprocess.Popen | None = None  # holder.py
        self._doing, self._since = Doing(), time.monotonic()
        self._changed = threading.Condition()  # of what follows
        self._rounds = 0
        self._posted: dict[int, dict[int, object]] = {}  # at the hub: values by round and process
        self._reduced: dict[int, Callable[[list], Any]] = {}  # at the hub, by round
        self._agreed: dict[int, Any] = {}
        self._farewell: End | None = None  # what the hub says to a process that leaves
        self._over = threading.Lock()  # held by the thread that ends this process
        for peer in self.peers:
            threading.Thread(target=self._receive, args=(peer,), daemon=True).start()
        if self.peers:
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def index(self) -> int:
        return self.process.index

    @property
    def count(self) -> int:
        return len(self.members)

    @property
    def first(self) -> bool:
        """Whether this process prints and writes what one writes for all."""
        return self.index == 0

    @property
    def here(self) -> list[Member]:
        """The processes on this one's host."""
        return [member for member in self.members if member.host == self.members[self.index].host]

    @property
    def gpus(self) -> list[int] | None:
        """The local GPUs of this process: one, where others on its host may use the same; None: all that it may use."""
        if len(self.here) == 1 or len({member.gpus for member in self.here}) > 1:
            return None
        return [self.here.index(self.members[self.index])]

    def at(self, phase: str, step: int | None = None, limit: float = 0.0) -> None:
        """Says what begins now. The watchdog counts in the phases of `WATCHED`, and begins anew.

        `limit`: seconds in which it has to end, where these are more than the watchdog's.
        """
        self._doing = Doing(phase, self._doing.step if step is None else step, limit=limit)
        self._since = time.monotonic()

    @property
    def doing(self) -> Doing:
        return replace(self._doing, seconds=time.monotonic() - self._since)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While inside, the main thread waits for devices: it is not the one that others wait for."""
        doing = self._doing
        doing.waiting = True
        try:
            yield
        finally:
            doing.waiting = False

    def agree(self, value, seconds: float | None = None, reduced: Callable[[list], Any] = list) -> Any:
        """What process 0's `reduced` makes of the JSON values that all processes call this with, by number.

        By default it is the values: then an answer grows with the number of processes, and all answers with its square.
        Returns when all have called; after `seconds` with None for the others, where this process is about to fail.
        """
        if not self.peers:
            return reduced([value])
        self._rounds += 1
        if self.first:
            self._reduced[self._rounds] = reduced
            self._post(self._rounds, 0, value)
        else:
            self.peers[0].connection.send(round=self._rounds, value=value, doing=asdict(self.doing))
        with self.waiting():
            self._wait(lambda: self._rounds in self._agreed, time.monotonic() + (seconds or float("inf")))
        alone = [value if index == self.index else None for index in range(self.count)]
        return self._agreed.pop(self._rounds) if self._rounds in self._agreed else reduced(alone)

    def _post(self, number: int, index: int, value) -> None:
        with self._changed:
            values = self._posted.setdefault(number, {})
            values[index] = value
            if len(values) < self.count:
                return
            agreed = self._reduced.pop(number)([value for _, value in sorted(self._posted.pop(number).items())])
            self._agreed[number] = agreed
            self._changed.notify_all()
        self._send_all(round=number, agreed=agreed, doing=asdict(self.doing))

    def _send_all(self, **message) -> None:
        """The same to all peers."""
        encoded = line(**message)
        for peer in self.peers:
            peer.connection.send_line(encoded)

    def leave(self, end: End) -> tuple[End, bool]:
        """This process is about to exit, with `end`. Returns when all are; where it alone is, the others are ended.

        Returns:
            the end to exit with, and whether it has been told to the user by another process.
        """
        end = replace(end, together=self._doing.phase == "ending")
        limit = time.monotonic() + (float("inf") if end.together else GRACE)
        if not self.first:
            self.peers[0].connection.send(left=asdict(end))
            self._wait(lambda: self._farewell is not None, limit + GRACE)
            self._over.acquire()
            if self._farewell is None:
                return end, False
            status = end.status or self._farewell.status
            told = end.message in self._farewell.message if status != cli.CRASHED else end == self._farewell
            return replace(end, status=status), told and self.members[0] in self.here
        self._wait(lambda: all(peer.left is not None for peer in self.peers), limit)
        self._over.acquire()
        failed = [self._seen(peer) for peer in self.peers if peer.left is not None and peer.left.status]
        if end.status == cli.DONE and failed:
            end = failed[0]
        self._send_home(end, self._of_others(self.members[0], end) if end.status else end)
        return end, False

    def fail(self, end: End) -> None:
        """Ends the job, from any thread, for what has gone wrong in this process."""
        end = self._of_others(self.members[self.index], end)
        if self.first:
            self._end(end)
        self.peers[0].connection.send(fail=asdict(end))  # the hub ends this process too

    def _wait(self, reached, limit: float) -> None:
        with self._changed:
            while not reached() and time.monotonic() < limit:
                self._changed.wait(0.1)  # signals are handled in between

    def _send_home(self, to_left: End, to_others: End) -> None:
        for peer in self.peers:
            if peer.left is not None:
                peer.connection.send(farewell=asdict(to_left))
            else:
                peer.connection.send(end=asdict(to_others))

    def _receive(self, peer: Peer) -> None:
        """The thread of a connection."""
        while (message := peer.connection.receive()) is not None:
            peer.heard = time.monotonic()
            if "doing" in message:
                peer.doing = Doing(**message["doing"])
            with self._changed:
                match message:
                    case {"round": number, "agreed": agreed}:
                        self._agreed[number] = agreed
                    case {"left": left}:
                        peer.left = End(**left)
                    case {"farewell": farewell}:
                        self._farewell = End(**farewell)
                self._changed.notify_all()
            match message:
                case {"round": number, "value": value}:
                    self._post(number, peer.member.index, value)
                case {"left": {"together": False}}:
                    timer = threading.Timer(GRACE, lambda: self._end(self._seen(peer)))
                    timer.daemon = True
                    timer.start()
                case {"end": end} | {"fail": end}:
                    self._end(End(**end))
                case {"farewell": _}:
                    return
        if peer.left is None:
            self._lost(peer, "is gone")

    def _watch(self) -> None:
        """The thread that says that this process lives, and sees who no longer does, or does not get on."""
        last = time.monotonic()
        while True:
            time.sleep(BEAT)
            now = time.monotonic()
            held = now - last > BEAT + PAUSE  # this process was: the others' words lie unread
            if held:
                self._since += now - last
                for peer in self.peers:
                    peer.heard = now
            last, doing = now, self.doing
            self._send_all(doing=asdict(doing))
            for peer in self.peers:
                silence = self.silence(peer.doing)
                if now - peer.heard > silence and peer.left is None:
                    self._lost(peer, f"has been silent for {silence:g} s (train.heartbeat_seconds)")
            if self.first and not held:
                self._look_for_stuck([doing, *(peer.doing for peer in self.peers)])

    def silence(self, doing: Doing) -> float:
        """Seconds without a word after which a process that was at this counts as lost."""
        return self.heartbeat * (1 if doing.phase in WATCHED else HELD)

    def _look_for_stuck(self, doings: list[Doing]) -> None:
        if any(doing.phase not in WATCHED or doing.seconds < max(self.watchdog, doing.limit) for doing in doings):
            return
        limit = max(self.watchdog, *(doing.limit for doing in doings))
        which = "train.watchdog_seconds" if limit == self.watchdog else "of a save"
        none = f"nothing came to an end in {limit:g} s ({which})"
        stacks = f"; what each is at: {self.folder}/stacks-*.txt"
        _, _, index = min((doing.waiting, doing.step, i) for i, doing in enumerate(doings))
        if doings[index].waiting:
            all_wait = "; ".join(f"process {i} in {doing}" for i, doing in enumerate(doings))
            self._end(End(cli.RESTART, f"{none}; all wait for each other: {all_wait}{stacks}"))
        self._end(End(cli.RESTART, f"{self.members[index]} is stuck in {doings[index]}: {none}{stacks}"))

    def _lost(self, peer: Peer, how: str) -> None:
        self._end(End(cli.RESTART, f"{peer.member} {how}, in {peer.doing}"), peer.member)

    def _seen(self, peer: Peer) -> End:
        """The end of another process, as the others end with it."""
        return self._of_others(peer.member, peer.left)

    def _of_others(self, member: Member, end: End) -> End:
        status = cli.RESTART if end.status == cli.CRASHED else end.status
        return End(status, f"{member}: {end.message}")

    def _end(self, end: End, lost: Member | None = None) -> None:
        """Ends this process, and at the hub all others, from whatever thread."""
        self._over.acquire()  # and never released
        if self.first:
            self._send_home(end, end)
        if next(member for member in self.here if member != lost) == self.members[self.index]:  # one speaks on a host
            with contextlib.suppress(OSError):  # nobody listens
                os.write(2, f"error: {end.message}\n".encode(errors="backslashreplace"))
        if end.status == cli.RESTART and self.folder is not None:
            with contextlib.suppress(OSError), (self.folder / f"stacks-{self.index}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        os._exit(end.status)


ALONE = Job([Member.of(Process())], Process())
