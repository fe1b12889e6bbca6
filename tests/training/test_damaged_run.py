"""A run's folder that is in use, damaged, or only to be read: told, and nothing is lost."""

import json
import os
import subprocess
import sys

import kill
import pytest
from runs import snapshot, steps
from users import held_to_permissions

from maxsep.config import cli
from maxsep.config.paths import REPOSITORY
from maxsep.output.lock import Lock


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
    assert (status, err) == (cli.DONE, "") and told in out and f"going on from step 2 in {workdir}" in out
    assert (kill.figures(workdir), kill.state(workdir)) == whole
    assert len(list((workdir / "checkpoints" / "damaged").iterdir())) == 1


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
        f"error: --workdir: {why}; takes it back, or more train.steps to go on without\n",
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
