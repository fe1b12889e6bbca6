"""How a run ends that a signal, a full disk or a failed save stops, and goes on."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time

import kill
import pytest
from runs import at_step, checkpoints, snapshot, steps

from maxsep.config import cli
from maxsep.output.checkpoint import Checkpoints

# The compilation cache is on the same disk; a user is warned, and trains on.
CACHE = pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache")


@pytest.fixture
def full_disk():
    """Files may grow to 24 kB, once it is called."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@CACHE
def test_a_failed_last_save_is_told(call, workdir, full_disk, monkeypatch):
    def when_saved():
        while not (workdir / "checkpoints" / "2").exists():
            time.sleep(0.01)
        full_disk()

    at_step(monkeypatch, 3, when_saved)
    status, out, err = call(workdir, train__checkpoint_every=2)
    assert status == cli.SAVE_FAILED
    assert f"warning: checkpoint of step 4 was not saved in {workdir}/checkpoints: " in out
    assert err == f"error: the last save failed; see above. {workdir} has the one before it\n"
    assert max(Checkpoints(workdir / "checkpoints", read_only=True).all_steps()) == 2


@CACHE
def test_a_save_that_fails_on_the_way_is_told_and_training_goes_on(call, workdir, full_disk, monkeypatch):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 2, full_disk)
    at_step(monkeypatch, 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    status, out, err = call(workdir, train__checkpoint_every=2, train__steps=6)
    assert (status, err) == (cli.DONE, "")
    assert f"warning: checkpoint of step 2 was not saved in {workdir}/checkpoints: " in out
    assert max(checkpoints(workdir)) == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step(call, workdir, finished_run, monkeypatch, number):
    """The evaluation that was due then is made when it goes on."""
    if signal.getsignal(number) == signal.SIG_IGN:  # of the tests, as under nohup: it would be ignored here too
        signal.signal(number, signal.SIG_DFL)
    handler = signal.getsignal(number)
    with monkeypatch.context() as patched:
        at_step(patched, 1, lambda: os.kill(os.getpid(), number))  # when the next step is under way
        status, _, err = call(workdir, train__eval_every=2)
    assert status == cli.STOPPED and signal.getsignal(number) == handler
    (saved,) = checkpoints(workdir)
    name = signal.Signals(number).name
    assert err == f"error: {name}: stopped after step {saved}, saved; the same command resumes from there\n"
    assert saved == 2 and max(steps(workdir, "train")) == saved
    before = snapshot(workdir)
    status, _, err = call(workdir, train__steps=saved - 1)  # it has no result there
    assert (status, err) == (
        cli.USER_ERROR,
        f"error: train.steps: got {saved - 1}, but the run in {workdir} was stopped after step {saved}; "
        f"takes at least {saved}\n",
    )
    assert {k: v for k, v in snapshot(workdir).items() if k.name != "checkpoints"}.items() <= before.items()
    assert call(workdir, train__eval_every=2)[0] == cli.DONE
    assert steps(workdir, "eval") == [2, 4]
    figures, whole = kill.figures(workdir), kill.figures(finished_run)
    assert {key: figures[key] for key in whole} == whole
    assert kill.state(workdir) == kill.state(finished_run)


@pytest.mark.parametrize("every", [0, 2])
def test_a_signal_ends_an_evaluation_which_is_made_when_the_run_goes_on(
    call, workdir, finished_run, monkeypatch, every
):
    """The last one, and one on the way."""
    step = every or 4
    with monkeypatch.context() as patched:
        at_step(patched, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        status, out, err = call(workdir, train__eval_every=every, train__log_every=every)
    assert status == cli.STOPPED and "evaluating on" in out
    expected = f"SIGTERM: stopped in the evaluation after step {step}, saved; the same command resumes from there"
    assert err == f"error: {expected}\n"
    assert (checkpoints(workdir), steps(workdir, "eval")) == ([step], [])
    assert not (workdir / "summary.json").exists()
    assert call(workdir, train__eval_every=every)[0] == cli.DONE
    assert (workdir / "summary.json").exists()
    assert steps(workdir, "eval") == ([2, 4] if every else [4])
    assert kill.figures(workdir)[4, "eval"] == kill.figures(finished_run)[4, "eval"]
    assert kill.state(workdir) == kill.state(finished_run)


def test_a_run_may_end_where_it_was_stopped(call, workdir, monkeypatch):
    with monkeypatch.context() as patched:
        at_step(patched, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert call(workdir)[0] == cli.STOPPED
    (saved,) = checkpoints(workdir)
    status, out, _ = call(workdir, train__steps=saved)
    assert status == cli.DONE and f"result after step {saved}\n" in out and "compiling" not in out
    assert steps(workdir, "eval") == [saved]


def test_a_disk_that_is_too_full_for_a_row_is_told(call, workdir, finished_run, monkeypatch):
    write = os.fsync  # nothing but metrics.jsonl is that small

    def full(descriptor):
        if (
            os.readlink(f"/proc/self/fd/{descriptor}") == f"{workdir}/metrics.jsonl"
            and len(steps(workdir, "train")) > 2
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        status, out, err = call(workdir, train__checkpoint_every=1)
    assert status == cli.SAVE_FAILED
    assert err == f"error: the last save failed; see above. {workdir} has the one before it\n"
    why = f"metrics.jsonl cannot be written in {workdir}: No space left on device"
    assert out.count(f"warning: {why}; its rows are kept until it can\n") == 1
    assert f"warning: checkpoint of step 3 was not saved: {why}\n" in out
    assert max(checkpoints(workdir)) == 2
    assert call(workdir)[0] == cli.DONE
    assert kill.figures(workdir) == kill.figures(finished_run)
    assert kill.state(workdir) == kill.state(finished_run)


class Unwritable:
    """Standard output that takes nothing."""

    def __init__(self, error, tmp_path):
        self.error, self.file = error, (tmp_path / "output").open("w")

    def write(self, text):
        raise self.error

    flush = isatty = lambda self: False

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize("eof", [True, False])
def test_output_that_nobody_takes(call, workdir, finished_run, tmp_path, monkeypatch, eof):
    """Where its reader has gone, a run ends as after a signal; on a full disk it goes on."""
    error = BrokenPipeError() if eof else OSError(errno.ENOSPC, "No space left on device")
    output = Unwritable(error, tmp_path)
    with monkeypatch.context() as patched:
        at_step(patched, 1, lambda: patched.setattr(sys.stdout, "_stream", output))
        status, _, err = call(workdir)
    output.file.close()
    if eof:
        assert status == cli.STOPPED
        (saved,) = checkpoints(workdir)
        assert err == f"error: SIGPIPE: stopped after step {saved}, saved; the same command resumes from there\n"
        assert call(workdir)[0] == cli.DONE
    else:
        told = "warning: standard output cannot be written (No space left on device); the run continues in silence\n"
        assert (status, err) == (cli.DONE, told)
    assert kill.state(workdir) == kill.state(finished_run)
    assert (workdir / "summary.json").exists()


def test_a_folder_that_is_removed_is_told_at_once_and_used_when_it_is_there_again(call, workdir, monkeypatch):
    """So is what was full: saving goes on where it can."""

    def remove():
        while not (workdir / "checkpoints" / "2").exists():  # else the save under way makes the folder anew
            time.sleep(0.01)
        workdir.rename(workdir.with_name("gone"))

    with monkeypatch.context() as patched:
        at_step(patched, 3, remove)
        at_step(patched, 6, workdir.mkdir)
        status, out, err = call(workdir, train__checkpoint_every=2, train__steps=8, train__log_every=3)
    assert (status, err) == (cli.DONE, "")
    lines = out.splitlines()
    told = f"warning: metrics.jsonl cannot be written in {workdir}: No such file or directory; its rows are kept"
    (at,) = (number for number, line in enumerate(lines) if line.startswith(told))
    assert lines[at - 1].startswith("step 3/8")
    assert f"warning: checkpoint of step 4 was not saved: {told[9 : told.index(';')]}" in lines
    assert "metrics.jsonl is written again" in lines
    assert checkpoints(workdir)[-1] == 8 and (workdir / "config.json").exists()
    assert steps(workdir, "train") == [3, 6, 8]
    assert call(workdir, train__steps=9)[0] == cli.DONE


def test_signals_that_are_ignored_stay_so():
    """As with nohup."""
    code = (
        "from signal import SIG_IGN, SIGHUP, raise_signal, signal\n"
        "from maxsep.cluster.signals import Stop\n"
        "signal(SIGHUP, SIG_IGN)\n"
        "with Stop() as stop:\n"
        "    raise_signal(SIGHUP); print(stop.asked)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "None\n")


def test_a_second_signal_ends_it_at_once():
    code = (
        "from signal import SIG_DFL, SIGINT, SIGTERM, raise_signal, signal\n"
        "from maxsep.cluster.signals import Stop\n"
        "signal(SIGINT, SIG_DFL)\n"  # which a shell's background job ignores
        "with Stop() as stop:\n"
        "    raise_signal(SIGTERM); print(stop.asked, flush=True); raise_signal(SIGINT); print('not reached')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "SIGTERM\n")
