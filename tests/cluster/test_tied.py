"""A child that ends as its own child does, and when its parent has ended."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import running

TIED = [sys.executable, "-m", "maxsep.cluster.tied"]


@pytest.mark.parametrize(
    "text, status",
    [
        ("raise SystemExit(75)", 75),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getppid(), 15); signal.pause()", -signal.SIGTERM),  # it is passed on
    ],
)
def test_it_ends_as_its_child_has_ended(text, status):
    assert subprocess.run([*TIED, str(os.getpid()), "-c", text], check=False).returncode == status


def test_the_death_of_its_parent_is_told_once(tmp_path):
    told = tmp_path / "told"
    child = f"""
import os, signal, time
def on(number, frame):
    with open({str(told)!r}, "a") as f:
        f.write("told ")
signal.signal(signal.SIGTERM, on)
open({str(told)!r}, "w").close()
while not os.path.getsize({str(told)!r}):
    time.sleep(0.01)
time.sleep(1)  # a second word would come soon
"""
    parent = f"""
import os, subprocess, sys, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
subprocess.Popen([*{TIED!r}, str(os.getpid()), "-c", {child!r}])
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", parent])
    try:
        while not told.exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    while running(str(told)):
        time.sleep(0.05)
    assert told.read_text() == "told "
