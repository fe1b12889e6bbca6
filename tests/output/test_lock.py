"""One job at a time writes in a folder; the lock ends with its process."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from maxsep.config import ConfigError
from maxsep.output.lock import NAME, Lock

HOLD = "import pathlib, sys; from maxsep.output.lock import Lock; Lock(pathlib.Path(sys.argv[1])).take(); "


def test_the_second_is_refused_until_the_first_has_died(tmp_path):
    wait = "print(flush=True); sys.stdin.read()"
    keep = HOLD.replace("Lock(pathlib", "lock = Lock(pathlib").replace(".take()", "; lock.take()")
    process = subprocess.Popen(
        [sys.executable, "-c", keep + wait, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        process.stdout.readline()
        taken = rf"^--workdir: {tmp_path} is in use by process {process.pid} on \S+ since .*; takes a folder that no"
        with pytest.raises(ConfigError, match=taken), Lock(tmp_path):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with Lock(tmp_path) as lock:
            lock.take()  # again, which is nothing
            with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"), Lock(tmp_path):
                pass
        with Lock(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()


def test_a_child_that_lives_on_does_not_hold_it(tmp_path):
    with Lock(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with Lock(tmp_path):
            pass
    finally:
        child.communicate(b"\n")


def test_the_first_process_holds_it_for_all_and_only_where_the_folder_is(tmp_path):
    class Second:
        first = False

    with Lock(tmp_path, Second()), Lock(tmp_path / "none") as lock:
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "none").mkdir()
        lock.take()
        assert [path.name for path in (tmp_path / "none").iterdir()] == [NAME]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def none(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with Lock(tmp_path):
        pass
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path} cannot be locked (No locks available): see that")
