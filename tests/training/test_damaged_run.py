"""A run's folder that is in use, damaged, or only to be read: told, and nothing is lost."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import kill
import orbax.checkpoint as ocp
import pytest
from runs import at_step, checkpoints, snapshot, steps
from users import held_to_permissions

from maxsep.config import cli, faults
from maxsep.config.paths import REPOSITORY
from maxsep.data import records
from maxsep.output.lock import Lock
from maxsep.output.record import read_loss
from maxsep.training.run import Run


def damage(step):
    """Flips bits in all files of arrays, as some hold what nobody reads."""
    for path in (step / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[::100] = bytes(byte ^ 1 for byte in content[::100])
        path.write_bytes(content)


def test_a_second_job_is_refused_and_touches_nothing(call, finished):
    before = snapshot(finished)
    with Lock(finished):
        status, out, err = call(finished, train__steps=6)
        assert (status, out) == (cli.USER_ERROR, "")
        assert err.startswith(f"error: --workdir: {finished} is in use by process {os.getpid()} on ")
        status, out, _ = call(finished, "--mode=eval")
        assert status == cli.DONE and "held-out loss" in out
    assert snapshot(finished) == before
    assert call(finished, train__steps=6)[0] == cli.DONE


def test_what_another_job_began_meanwhile_is_not_written_over(call, workdir, monkeypatch):
    """Two starts at the same moment: both see no run."""

    def take(self):
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.json").write_text("of the other")

    monkeypatch.setattr(Lock, "take", lambda self: take(self) if sys._getframe(1).f_code.co_name == "train" else None)
    status, _, err = call(workdir)
    assert status == cli.USER_ERROR and err.startswith("error: --workdir: another job has just begun a run in ")
    assert (workdir / "config.json").read_text() == "of the other"


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_taken(call, finished_run, workdir):
    """The run then has the bits of one that was never damaged; an evaluation takes the same and changes nothing."""
    assert call(workdir, train__checkpoint_every=2)[0] == cli.DONE
    whole = kill.figures(workdir), kill.state(workdir)
    damage(workdir / "checkpoints" / "4")
    before = snapshot(workdir)
    told = f"warning: checkpoint of step 4 in {workdir}/checkpoints is damaged: "
    status, out, err = call(workdir, "--mode=eval")
    assert (status, err) == (cli.DONE, "") and told in out and "step 2\n" in out
    assert snapshot(workdir) == before
    status, out, err = call(workdir, train__checkpoint_every=2)
    assert (status, err) == (cli.DONE, "") and told in out and f"resuming from step 2 in {workdir}" in out
    assert (kill.figures(workdir), kill.state(workdir)) == whole
    assert len(list((workdir / "checkpoints" / "damaged").iterdir())) == 1


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(call, finished, monkeypatch):
    """The disk answers again while the run waits for it, or the run ends to be started again."""
    whole, left = ocp.PyTreeCheckpointHandler.restore, [math.inf]

    def restore(self, *arguments, **options):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(arguments[0]))
        return whole(self, *arguments, **options)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)
    before = snapshot(finished)
    status, _, err = call(finished, train__steps=6)
    line = (
        f"error: checkpoint of step 4 in {finished}/checkpoints cannot be read: OSError: [Errno 116] Stale file handle"
    )
    assert (status, err.count("\n")) == (cli.RESTART, 1) and err.startswith(line)
    assert snapshot(finished) == before
    monkeypatch.setattr(faults, "RETRY_SECONDS", 60.0)
    monkeypatch.setattr(faults, "PAUSES", (0.0, 0.0))
    left[0] = 3
    status, out, _ = call(finished, train__steps=6)
    assert status == cli.DONE and "; trying again for 60 s\n" in out and "resuming from step 4" in out


def test_a_record_that_cannot_be_read_ends_the_run_to_be_started_again(call, finished_run, workdir, monkeypatch):
    """Without what the steps since the last checkpoint did; the run then has the bits of one that was left alone."""
    opened, left = records.open_shard, [20]

    def faulty(path):
        reader = opened(path)

        def read(indices):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError(f"read() failed: Input/output error; reading {path}")
            return reader.read(indices)

        return SimpleNamespace(read=read, num_records=reader.num_records)

    with monkeypatch.context() as patched:
        patched.setattr(records, "open_shard", faulty)
        status, _, err = call(workdir, train__checkpoint_every=1)
    assert status == cli.RESTART and err.startswith("error: data.cache: ") and err.count("\n") == 1
    assert err.endswith(".array_record; the same command resumes\n") and "cannot be read: read() failed: Input" in err
    assert len(checkpoints(workdir)) > 0
    assert call(workdir, train__checkpoint_every=1)[0] == cli.DONE
    assert kill.state(workdir) == kill.state(finished_run)


def test_a_fault_in_an_evaluation_costs_nothing(call, finished_run, workdir, monkeypatch):
    """The step is saved before. Its loss is kept with it when the evaluation has been made."""

    def out_of_memory(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Run, "evaluate", out_of_memory)
        status, _, err = call(workdir, train__eval_every=2, train__checkpoint_every=2)
    assert status == cli.CRASHED and "RESOURCE_EXHAUSTED" in err
    assert checkpoints(workdir) == [2] and steps(workdir, "train") == [1, 2] and steps(workdir, "eval") == []
    assert call(workdir, train__eval_every=2, train__checkpoint_every=2)[0] == cli.DONE
    assert kill.state(workdir) == kill.state(finished_run) and steps(workdir, "eval") == [2, 4]
    losses = {step: figures["loss"] for (step, split), figures in kill.figures(workdir).items() if split == "eval"}
    assert {step: read_loss(workdir / "checkpoints" / str(step)) for step in (2, 4)} == losses
    (workdir / "checkpoints" / "4" / "evaluation.json").unlink()  # as a kill between the row and this file leaves it
    assert call(workdir)[0] == cli.DONE and read_loss(workdir / "checkpoints" / "4") == losses[4]


def gone(run):
    shutil.rmtree(run / "checkpoints")


def empty(run):
    """As the folder of a disk that is not mounted."""
    gone(run)
    (run / "checkpoints").mkdir()


def without_summary(run):
    gone(run)
    (run / "summary.json").unlink()


@pytest.mark.parametrize("how", [gone, empty, without_summary])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(call, finished, complete, how):
    how(finished)
    before = snapshot(finished)
    line = f"the checkpoints of the run in {finished} are gone (its disk may not be mounted); takes them back in "
    for arguments in (["--config.train.steps=6"], [], ["--mode=eval"]):
        status, out, err = call(finished, *arguments)
        assert (status, out, err.count("\n")) == (cli.USER_ERROR, "", 1) and err.startswith(f"error: --workdir: {line}")
    assert complete(f"--workdir={finished}", "--prompt=a")[2].startswith(f"error: --workdir: {line}")
    status, _, err = call(finished.with_name("next"), train__init_from=finished)
    assert (status, err.startswith(f"error: train.init_from: {line}")) == (cli.USER_ERROR, True)
    assert snapshot(finished) == before


def test_a_link_of_checkpoints_that_leads_nowhere_is_named(call, finished):
    (finished / "checkpoints").rename(finished.with_name("disk"))
    (finished / "checkpoints").symlink_to(finished.with_name("disk"))
    assert call(finished)[0] == cli.DONE
    finished.with_name("disk").rename(finished.with_name("unmounted"))
    status, _, err = call(finished, train__steps=6)
    what = f"--workdir: {finished}/checkpoints is a link to {finished.with_name('disk')}, which is not there"
    assert (status, err) == (cli.USER_ERROR, f"error: {what}; takes a folder of checkpoints, or none\n")
    (finished / "checkpoints").unlink()
    (finished / "checkpoints").write_text("")
    assert call(finished)[2].startswith(f"error: --workdir: {finished}/checkpoints is no folder; takes")


def test_a_run_that_was_killed_before_its_first_save_begins_anew_and_says_so(call, finished_run, workdir, monkeypatch):
    def killed():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        at_step(patched, 3, killed)
        call(workdir, train__checkpoint_every=4)
    assert steps(workdir, "train") == [1, 2]
    status, out, _ = call(workdir)
    assert status == cli.DONE and "no step was saved: starting anew; 2 rows of metrics.jsonl are removed\n" in out
    assert kill.state(workdir) == kill.state(finished_run)


def test_where_no_checkpoint_is_whole_nothing_begins_anew(call, finished):
    damage(finished / "checkpoints" / "4")
    before = snapshot(finished)
    for arguments in [("--mode=eval",), ("--config.train.steps=6",)]:
        status, _, err = call(finished, *arguments)
        none = f"error: workdir: {finished}/checkpoints has no checkpoint that is whole: checkpoint of step 4 in "
        assert status == cli.USER_ERROR and err.startswith(none) and err.count("\n") == 1
    assert snapshot(finished) == before


def test_a_run_without_its_rows_says_so(call, finished):
    (finished / "metrics.jsonl").unlink()
    before = snapshot(finished)
    status, _, err = call(finished)
    why = f"{finished} has no metrics.jsonl, which has the figures of the run's 4 steps"
    assert (status, err) == (
        cli.USER_ERROR,
        f"error: --workdir: {why}; takes it back, or more train.steps to resume without it\n",
    )
    assert snapshot(finished) == before
    assert call(finished, train__steps=6)[0] == cli.DONE and steps(finished, "train") == [5, 6]


def test_damaged_rows_are_named_and_empty_ones_do_no_harm(call, finished):
    path = finished / "metrics.jsonl"
    rows = path.read_text()
    path.write_text(rows + "\n")
    assert call(finished, train__steps=5)[0] == cli.DONE
    assert steps(finished, "train") == [1, 2, 3, 4, 5]
    rows = path.read_text()
    path.write_text(rows.replace('{"step": 2', '{"step": 2 2'))
    status, _, err = call(finished, train__steps=6)
    assert (
        status == cli.USER_ERROR and err.startswith(f"error: --workdir: {path}:2 is damaged") and err.count("\n") == 1
    )
    (finished / "summary.json").write_text("{")
    path.write_text(rows)
    assert call(finished, train__steps=5)[0] == cli.DONE
    assert json.loads((finished / "summary.json").read_text())["steps"] == 5


def test_a_finished_run_keeps_its_config(call, finished):
    before = (finished / "config.json").read_bytes()
    assert call(finished, train__steps=3)[0] == cli.DONE
    assert (finished / "config.json").read_bytes() == before


def test_the_commands_it_prints_work_from_anywhere(call, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, out, _ = call(finished)
    assert f"python {REPOSITORY}/infer.py --workdir=run '--prompt=Return the'\n" in out
    assert f"python {REPOSITORY}/train.py --workdir=run --config.train.steps=8\n" in out


def test_a_run_that_may_only_be_read_is_evaluated(finished, data):
    for path in (finished, *finished.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        command = [*held_to_permissions(), sys.executable, str(kill.TRAIN), "--mode=eval", f"--workdir={finished}"]
        done = subprocess.run(command, capture_output=True, text=True, env=kill.environment())
    finally:
        for path in (finished, *finished.rglob("*")):
            path.chmod(0o755)
    assert done.returncode == cli.DONE, done.stderr
    assert "held-out loss" in done.stdout


@pytest.mark.parametrize("platform", ["cuda", "abacus"])
def test_devices_that_are_not_there(workdir, data, platform):
    command = [sys.executable, str(kill.TRAIN), f"--workdir={workdir}", *kill.flags(data)]
    environment = kill.environment() | {"JAX_PLATFORMS": platform}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == cli.USER_ERROR
    assert done.stderr.startswith(f"error: JAX_PLATFORMS: got '{platform}', of which JAX finds no device here")
    assert done.stderr.count("\n") == 1 and not workdir.exists()
