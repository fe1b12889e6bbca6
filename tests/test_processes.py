"""Runs of several processes: the same results, ends to which all come, and going on with another number of them."""

import glob
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import kill
import processes
import pytest
from corpora import mixed
from runs import SMALL

from maxsep.config import cli

WIDE = SMALL | {"mesh__attention": 2, "mesh__expert": 2}
LARGE = WIDE | {"mesh__attention": 4, "mesh__expert": 4, "train__batch_size": 16, "train__steps": 20}
HEARTBEAT, WATCHDOG = 30, 20  # a busy machine may hold a process for seconds
FAULTS = ("killed", "raising", "stopped", "stuck")


def saved(workdir):
    """The steps in a folder that another process writes."""
    return [int(name) for name in glob.iglob("*", root_dir=workdir / "checkpoints") if name.isdigit()]


def losses(workdir):
    return {key: row["loss"] for key, row in kill.figures(workdir).items()}


def close(one, other):
    assert one.keys() == other.keys()
    assert all(math.isclose(one[key], other[key], rel_tol=1e-9) for key in one), (one, other)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The run of `LARGE` in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    kill.train(folder, *kill.flags(data, **LARGE), env=kill.environment() | processes.QUICK)
    return folder


def test_two_processes_train_as_one_does(workdir, data, call, finished_run):
    """And print from the first, and evaluate, and leave a run that one process evaluates alike."""
    flags = kill.flags(data, **WIDE)
    with processes.Processes(workdir, 2, *flags) as both:
        assert both.ended() == [0, 0], both.all_printed()
        printed = both.printed()
        assert both.printed(1) == ""
    assert re.match(r"2 processes on 1 host; \S+: 0 \(pid \d+\), 1 \(pid \d+\)\n", printed)
    assert "4 x simulated CPU device in 2 processes" in printed and "Gloo" not in printed
    close(losses(workdir), losses(finished_run))
    assert json.loads((workdir / "config.json").read_text())["devices"]["processes"] == 2
    status, printed, _ = call(workdir, "--mode=eval")
    assert status == cli.DONE
    assert f"{json.loads((workdir / 'summary.json').read_text())['eval_loss']:.4f}" in printed


@pytest.mark.slow
@pytest.mark.parametrize("fault, moment, victim", [("killed", "step", 0), ("stuck", "step", 1)])
def test_all_end_where_one_fails(workdir, data, fault, moment, victim):
    fails(workdir, data, fault, moment, victim)
    assert {2, 4} & set(saved(workdir))


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", [0, 1])
def test_all_end_where_one_cannot_write(workdir, data, victim):
    fails(workdir, data, "raising", "write", victim)


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["step", "save"])
@pytest.mark.parametrize("fault", FAULTS)
def test_all_end_whatever_fails(workdir, data, fault, moment, victim):
    """And the same command then resumes to the end."""
    flags = fails(workdir, data, fault, moment, victim)
    assert processes.train(workdir, 2, *flags).count("resuming from step") == 1
    assert sorted(step for step, split in kill.figures(workdir) if split == "train") == list(range(1, 9))


def fails(workdir, data, fault, moment, victim):
    """The other process ends and says who failed; flags. One checkpoint was saved."""
    flags = kill.flags(
        data,
        **WIDE | {"train__steps": 8, "train__checkpoint_every": 2},
        train__heartbeat_seconds=HEARTBEAT,
        train__watchdog_seconds=WATCHDOG,
    )
    with processes.Processes(workdir, 2, *flags, fault=(victim, fault, moment, "6")) as both:
        statuses = both.ended(but=victim if fault == "stopped" else None)
        said = both.printed(1 - victim if fault in ("killed", "stopped") else 0)
    assert statuses[1 - victim] in (cli.RESTART, cli.SAVE_FAILED), both.all_printed()
    (line,) = re.findall(r"^error: .*", said, re.MULTILINE)
    assert f"process {victim} (" in line or (moment != "step" and "all wait for each other" in line)
    assert re.search(r"step [456]\b", line), line
    if fault != "raising":
        assert (workdir / f"stacks-{1 - victim}.txt").read_text()
    return flags


MOMENTS = {
    "compiling": lambda job: "compiling" in job.printed(),
    "training": lambda job: re.search(r"step +5/", job.printed()),
    "evaluating": lambda job: "evaluating on" in job.printed(),
    "saving": lambda job: any(glob.iglob("checkpoints/*.orbax-checkpoint-tmp", root_dir=job.workdir)),
    "preparing": lambda job: "preparing" in job.printed(),
}


@pytest.mark.slow
def test_a_signal_to_the_second_process_ends_the_run_saved(workdir, data, tmp_path):
    signalled(workdir, data, tmp_path, "training", 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("phase", MOMENTS)
def test_a_signal_to_either_process_ends_the_run_saved(workdir, data, tmp_path, phase, victim):
    signalled(workdir, data, tmp_path, phase, victim)


def signalled(workdir, data, tmp_path, phase, victim):
    changed = {
        "evaluating": {"train__eval_every": 5},
        "saving": {"train__checkpoint_every": 3},
        "preparing": {"data__path": kill.text(tmp_path, 20_000), "data__cache": tmp_path / "cache"},
    }.get(phase, {})
    with processes.Processes(workdir, 2, *kill.flags(data, **WIDE | {"train__steps": 100_000} | changed)) as both:
        while not MOMENTS[phase](both):
            assert all(child.poll() is None for child in both.children), both.all_printed()
            time.sleep(0.002)
        both.children[victim].send_signal(signal.SIGTERM)
        assert both.ended() == [cli.STOPPED] * 2, both.all_printed()
        (line,) = re.findall(r"^error: .*", both.printed(), re.MULTILINE)
        assert both.printed(1) == ""
    assert "SIGTERM" in line
    if phase == "preparing":
        assert not workdir.exists() or not saved(workdir)
    else:
        (step,) = re.findall(r"after step (\d+), saved", line)
        assert max(saved(workdir)) == int(step)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes(workdir, data, call, tmp_path):
    """Two under another layout and mesh, then one: the curve of one process, of a mixture of sources."""
    shared = {"train__steps": 6, "train__checkpoint_every": 2, "optimizer__decay_steps": 6} | mixed(tmp_path)
    undisturbed = tmp_path / "undisturbed"
    assert call(undisturbed, **shared)[0] == cli.DONE
    other = {"layout": "tp", "mesh__attention": 2, "mesh__expert": 1, "train__steps": 3}
    processes.train(workdir, 2, *kill.flags(data, **WIDE | shared | other))
    assert call(workdir, **shared)[0] == cli.DONE
    ran = {key: loss for key, loss in losses(workdir).items() if key[1] == "train"}
    close(ran, {key: loss for key, loss in losses(undisturbed).items() if key in ran})
    assert len(ran) == 6


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout, inner", [("ma", "attention"), ("ma", "expert"), ("ma_folded", "attention")])
@pytest.mark.parametrize("count", [2, 4])
def test_losses_are_those_of_one_process(workdir, data, alone, tmp_path, count, layout, inner):
    """With expert traffic across processes where attention lies inside; repeated, the same bits."""
    if layout == "ma_folded":
        changed = LARGE | {"layout": layout, "model__experts": 16, "mesh__inner": inner}
        one = tmp_path / "one"
        kill.train(one, *kill.flags(data, **changed), env=kill.environment() | processes.QUICK)
    else:
        changed, one = LARGE | {"mesh__inner": inner}, alone
    flags = kill.flags(data, **changed)
    processes.train(workdir, count, *flags)
    close(losses(workdir), losses(one))
    again = tmp_path / "again"
    processes.train(again, count, *flags)
    assert losses(again) == losses(workdir) and kill.state(again) == kill.state(workdir)


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [2, 4])
def test_processes_read_disjoint_rows(workdir, data, count):
    """Where the batch is split across processes, and only there."""
    read = []
    for index in range(count):
        flags = kill.flags(data, **LARGE | {"mesh__inner": "attention", "train__steps": 1})
        with processes.Processes(workdir, count, *flags, fault=(index, "reading", "", "0")) as job:
            assert job.ended() == [0] * count, job.all_printed()
            (rows,) = re.findall(r"rows \[(.*)\] of 16", job.printed(index))
        read += map(int, rows.split(","))
        shutil.rmtree(workdir)
    assert sorted(read) == list(range(16))


@pytest.mark.slow
def test_launch_starts_again_what_was_killed(workdir, data, tmp_path):
    """The result has the bits of the undisturbed run, and no process is left."""
    flags = kill.flags(data, **WIDE | {"train__steps": 40, "train__checkpoint_every": 4})
    undisturbed = tmp_path / "undisturbed"
    processes.train(undisturbed, 2, *flags)
    command = [sys.executable, "-m", "maxsep.launch", "--processes=2", "--restarts=3", "--"]
    environment = kill.environment() | processes.QUICK
    job = [*command, str(kill.TRAIN), f"--workdir={workdir}", *flags]
    launch = subprocess.Popen(job, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not saved(workdir):
            assert launch.poll() is None, launch.stderr.read()
            time.sleep(0.01)
        children = [pid for pid in processes.running(str(workdir)) if pid != launch.pid]
        os.kill(children[0], signal.SIGKILL)
        said = launch.communicate(timeout=kill.LIMIT)[1]
    finally:
        launch.kill()
    assert launch.returncode == 0, said
    assert said.count("was killed by SIGKILL") == 1
    assert re.findall(r"start (\d) of 4", said) == ["2"]
    assert losses(workdir) == losses(undisturbed) and kill.state(workdir) == kill.state(undisturbed)


def answers(data, *commands, program=kill.TRAIN, environment=()):
    """Exit statuses, and lines said, of commands that are started at once; PORT is a free port."""
    port, flags = processes.free_port(), kill.flags(data, **WIDE)
    children = [
        subprocess.Popen(
            [sys.executable, str(program), *flags, *(flag.replace("PORT", str(port)) for flag in command)],
            env=kill.environment() | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        said = [child.communicate(timeout=kill.LIMIT)[0].splitlines() for child in children]
    finally:
        for child in children:
            child.kill()
    return [child.returncode for child in children], said


def job(index, count=2, *more):
    return ["--coordinator=localhost:PORT", f"--num_processes={count}", f"--process_id={index}", *more]


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "x", "SLURM_STEP_NODELIST": "localhost"}
MISTAKES = {
    "no port": ([["--coordinator=localhost", "--num_processes=2", "--process_id=0"]], "--coordinator: got 'localhost'"),
    "no number": ([["--coordinator=localhost:x", "--num_processes=2", "--process_id=0"]], "--coordinator: got"),
    "no id": ([["--coordinator=localhost:PORT", "--num_processes=2"]], "--process_id: none given"),
    "no count": ([["--coordinator=localhost:PORT", "--process_id=0"]], "--num_processes: none given"),
    "no coordinator": ([["--num_processes=2", "--process_id=0"]], "--coordinator: none given"),
    "id out of range": ([job(2)], "--process_id: got 2; takes 0 to 1"),
    "negative id": ([job(-1)], "--process_id: got -1"),
    "no process": ([job(0, 0)], "--num_processes: got 0"),
    "no time": ([job(0, 2, "--join_seconds=0")], "flag --join_seconds=0"),
    "one id twice": ([job(0, 3), job(1, 3), job(1, 3)], "--process_id: got 1 in two processes"),
    "counts differ": ([job(0, 2), job(1, 3)], "--num_processes: got 3 in process 1"),
    "configs differ": ([job(0), job(1, 2, "--config.train.steps=5")], "train.steps: got 5 in process 1"),
    "layouts differ": ([job(0), job(1, 2, "--config.layout=tp")], "layout: got 'tp' in process 1"),
    "folders differ": ([job(0), job(1, 2, "--workdir=DIFFERENT")], "--workdir: got"),
    "a mesh that does not divide": ([job(index, 3) for index in range(3)], "mesh: got stage 1 x attention 2"),
    "missing host": ([job(0, 2, "--join_seconds=3")], "--num_processes: got 2, but process 1 did not come within 3 s"),
    "no first process": ([job(1, 2, "--join_seconds=3")], "--coordinator: got localhost:"),
    "garbage of Slurm": ([[]], "SLURM_PROCID: got x"),
}
LATE = ("missing host", "no first process")  # they may come another time


@pytest.mark.exhaustive
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, data, tmp_path):
    commands, starts = MISTAKES[mistake]
    folder = f"--workdir={tmp_path / 'run'}"
    commands = [[folder, *(flag.replace("DIFFERENT", str(tmp_path / "other")) for flag in each)] for each in commands]
    environment = SLURM if mistake == "garbage of Slurm" else {}
    statuses, said = answers(data, *commands, environment=environment)
    status = cli.RESTART if mistake in LATE else cli.USER_ERROR
    assert statuses == [status] * len(commands), said
    lines = [line for each in said for line in each if not re.match(r"\d processes on 1 host", line)]
    assert len(lines) == 1 and lines[0].startswith(f"error: {starts}"), said
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
def test_a_port_in_use_is_one_line(data, tmp_path):
    with socket.create_server(("", 0)) as taken:
        there = f"--coordinator=localhost:{taken.getsockname()[1]}"
        command = [*job(0), there, f"--workdir={tmp_path / 'run'}"]
        statuses, said = answers(data, command)
    assert statuses == [cli.USER_ERROR] and said[0][0].startswith("error: --coordinator: cannot listen on port ")


@pytest.mark.exhaustive
def test_no_process_outlives_launch(workdir, data):
    flags = kill.flags(data, **WIDE | {"train__steps": 1000})
    command = [sys.executable, "-m", "maxsep.launch", "--processes=2", "--", str(kill.TRAIN), f"--workdir={workdir}"]
    launch = subprocess.Popen(
        [*command, *flags], env=kill.environment() | processes.QUICK, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
            assert launch.poll() is None, launch.stderr.read()
            time.sleep(0.1)
    finally:
        launch.kill()
        launch.communicate()
    end = time.monotonic() + kill.LIMIT
    while (
        found := subprocess.run(["pgrep", "-f", str(workdir)], capture_output=True).stdout
    ) and time.monotonic() < end:
        time.sleep(0.5)
    assert not found
    assert saved(workdir), "SIGTERM reached the processes when their parent was killed"


@pytest.mark.exhaustive
def test_two_processes_complete_texts_as_one_does(finished_run, tmp_path):
    """From standard input, which the first reads; and print once."""
    found = []
    for launch, mesh in ([], (1, 1)), (["-m", "maxsep.launch", "--processes=2", "--"], (2, 2)):
        file = tmp_path / f"{len(found)}.jsonl"
        shape = [f"--config.mesh.{axis}={size}" for axis, size in zip(("attention", "expert"), mesh, strict=True)]
        flags = [f"--workdir={finished_run}", "--max_new_tokens=12", f"--json={file}", *shape]
        command = [sys.executable, *launch, str(kill.TRAIN.with_name("infer.py")), *flags]
        environment = kill.environment() | processes.QUICK
        done = subprocess.run(
            command, input="abc\ndefgh\n", env=environment, capture_output=True, text=True, timeout=kill.LIMIT
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("new tokens") == 1
        found.append([json.loads(line) for line in file.read_text().splitlines()])
    for one, two in zip(*found, strict=True):
        assert one["tokens"] == two["tokens"]
        assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(one["logprobs"], two["logprobs"], strict=True))
