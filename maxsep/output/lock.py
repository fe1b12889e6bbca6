"""One job at a time writes in a folder: a lock that the kernel takes back from a process that dies."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import BinaryIO

from maxsep.cluster.job import ALONE, Job
from maxsep.config import ConfigError

NAME = "lock"
# What file systems say that have no locks, some network file systems among them.
NONE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class Lock:
    """The right to write in a folder. The first process of a job holds it for all, to its end.

    Entering takes it where the folder is there; else `take` does once it has been made. A file in it, which stays, says
    who had it last.

    Raises:
        ConfigError: another job has it; nothing was touched.
    """

    def __init__(self, folder: Path, job: Job = ALONE, flag: str = "--workdir"):
        self.folder, self.job, self.flag = folder, job, flag
        self._file: BinaryIO | None = None

    def take(self) -> None:
        """Takes it, if this process does not have it, the folder is there, and it is the first of its job."""
        if self._file is not None or not self.job.first or not self.folder.is_dir():
            return
        path = self.folder / NAME
        try:
            file = path.open("a+b", buffering=0)  # closing has nothing left to write, also on a full disk
        except OSError as e:
            raise ConfigError(f"{self.flag}: cannot write to {self.folder}: {e.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = " ".join(file.read().decode(errors="replace").split()) or "another process"
            file.close()
            raise ConfigError(
                f"{self.flag}: {self.folder} is in use by {who}; takes a folder that no other job writes in"
            ) from None
        except OSError as e:
            if e.errno not in NONE:
                raise ConfigError(f"{self.flag}: cannot lock {path}: {e.strerror}") from None
            what = f"warning: {self.folder} cannot be locked ({e.strerror}): see that no other job writes in it"
            print(what, file=sys.stderr, flush=True)
        self._file = file
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk: the lock holds without
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())

    def __enter__(self) -> "Lock":
        self.take()
        return self

    def __exit__(self, *exc) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
