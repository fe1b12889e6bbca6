"""maxsep.launch: its command line, and what its children say and do."""

import signal
import subprocess
import sys

import kill
import pytest

from maxsep import launch
from maxsep.cluster import group
from maxsep.config import cli

CHILD = """
import os, pathlib, signal, sys, time
index, ready = os.environ["JAX_PROCESS_ID"], pathlib.Path(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("said by", index, flush=True)
print("error: the same", file=sys.stderr, flush=True)
print("of", index, "without an end", end="", file=sys.stderr, flush=True)
if index == "1":
    while not ready.exists():
        time.sleep(0.01)
    sys.exit(int(sys.argv[1]))
ready.touch()
while True:
    signal.pause()
"""


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--processes: none given"),
        (["--processes=2"], "command: none given"),
        (["--processes=0", "--", "train.py"], "--processes"),
        (["--processes=2", "--", "trian.py"], "command: got trian.py"),
        (["--processes=2", "trian.py"], "command: got trian.py"),
        (["--processes=2", "--resets=2", "train.py"], "resets"),
        (["--processes=2", "more", "--", "train.py"], "unexpected argument 'more'"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, capsys):
    assert launch.run(["launch", *arguments]) == cli.USER_ERROR
    line = capsys.readouterr().err
    assert line.startswith("error: ") and said in line and line.count("\n") == 1


def test_inside_a_job_it_refuses(monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    assert launch.run(["launch", "--processes=2", "--", "train.py"]) == cli.USER_ERROR
    assert "JAX_NUM_PROCESSES: got 4; takes 1" in capsys.readouterr().err


@pytest.mark.parametrize("status, ends_with", [(2, 2), (73, 73), (71, 71), (1, 71)])
def test_children_are_heard_and_end_together(tmp_path, status, ends_with):
    """Process 1 ends; process 0, which would not, is ended with SIGTERM after a while."""
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    program = "import sys; from maxsep import launch; launch.group.LINGER = 0.2; sys.exit(launch.run(sys.argv))"
    command = [sys.executable, "-c", program, "--processes=2", str(child), str(status), str(tmp_path / "ready")]
    done = subprocess.run(command, capture_output=True, text=True, env=kill.environment(), timeout=kill.LIMIT)
    assert done.returncode == ends_with, done.stderr
    assert done.stdout == "said by 0\n"
    lines = done.stderr.splitlines()
    assert sum(line.endswith("error: the same") for line in lines) == 1
    assert {"[0] of 0 without an end", "[1] of 1 without an end"} <= set(lines)


def test_the_status_of_a_job():
    assert group.status([0, 0]) == cli.DONE
    assert group.status([71, -signal.SIGKILL]) == cli.RESTART
    assert group.status([71, cli.CRASHED]) == cli.RESTART
    assert group.status([75, 75]) == cli.STOPPED
    assert group.described([0, -9, 71]) == "process 1 was killed by SIGKILL; process 2 ended with status 71"
