"""The whole of an ablation: runs in processes of their own, a report, and what is kept when it is cut off."""

import json
import signal
import subprocess
import sys
import time

import kill
import pytest
from processes import QUICK, running
from runs import SMALL

from maxsep import ablate
from maxsep.ablation import session
from maxsep.ablation.session import Session
from maxsep.cluster import child
from maxsep.config import cli
from maxsep.output.lock import Lock


def arguments(data, folder, runs: str, *more: str, **changed) -> list[str]:
    own = {"mesh__attention", "mesh__expert"}
    flags = [f for f in kill.flags(data, **SMALL | changed) if not any(name.replace("__", ".") in f for name in own)]
    return ["ablate", f"--workdir={folder}", f"--runs={runs}", *flags, *more]


@pytest.fixture
def quick(monkeypatch):
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    for name in ("JAX_NUM_CPU_DEVICES", "PJRT_NPROC"):
        monkeypatch.delenv(name)


def read(folder) -> dict:
    return json.loads((folder / "ablation.json").read_text())


@pytest.mark.exhaustive  # the fast suite compares and reports given results: test_compare.py, test_report.py
def test_runs_that_differ_are_told(data, tmp_path, capsys, monkeypatch, quick):
    folder, other = tmp_path / "ablation", tmp_path / "other.txt"
    other.write_text(data.read_text()[::-1])
    training = Session._training

    def faulty(self, trial):
        return [*training(self, trial), *([f"--config.data.path={other}"] if trial.name == "tp:2x1" else [])]

    monkeypatch.setattr(Session, "_training", faulty)
    assert ablate.run(arguments(data, folder, "ma:1x2,tp:2x1", "--nodecode")) == cli.DONE
    out, _ = capsys.readouterr()
    warning = next(line for line in out.splitlines() if line.startswith("WARNING"))
    assert "losses are not the same: ma:1x2, tp:2x1 above 1e-09" in warning and "cannot be told which" in warning
    assert f"**{warning}.**" in (folder / "ablation.md").read_text()


@pytest.mark.slow
def test_what_has_finished_is_kept(data, tmp_path, capsys, monkeypatch, quick):
    folder = tmp_path / "ablation"
    argv = arguments(data, folder, "ma:1x2", "--nodecode")
    assert ablate.run(argv) == cli.DONE
    found = read(folder)
    (run,) = found["runs"]
    memory = run["memory"]
    assert 0 <= memory["unused"] <= 0.02 * sum(memory.values())
    assert sum(run["parts"].values()) == pytest.approx(1)
    assert len(run["losses"]) == 4 and sum(sent["operand_bytes"] for sent in run["sent"]) > 0

    capsys.readouterr()
    monkeypatch.setattr(child, "run", lambda *args: pytest.fail("a finished run was started again"))
    assert ablate.run(argv) == cli.DONE
    assert "1/1 ma:1x2: has finished" in capsys.readouterr()[0]
    assert read(folder) == found
    # With fewer steps the report still says what was run.
    assert ablate.run(arguments(data, folder, "ma:1x2", "--nodecode", train__steps=3)) == cli.DONE
    fewer = read(folder)
    assert fewer["facts"]["training"].startswith("4 steps of ") and fewer["runs"] == found["runs"]
    capsys.readouterr()
    first = f"the run in {folder / 'ma-1x2'} has"
    for field, other, told in (
        ("model.remat", "full", f"got 'full'; {first} 'none', which may not change"),
        ("data.tokenizer", "gpt2:257", f"got 'gpt2:257'; {first} 'bytes', whose ids may not change"),
    ):
        assert ablate.run([*argv, f"--config.{field}={other}"]) == cli.USER_ERROR, "its figures would be another's"
        assert capsys.readouterr()[1] == f"error: {field}: {told}\n"


@pytest.mark.parametrize(
    "status, said, why",
    [
        (
            -signal.SIGKILL,
            "step 2/4  loss 5.1",
            "killed by SIGKILL (out of memory?); the last",
        ),
        (-signal.SIGSEGV, "error: not told\nstep 2/4", "not told (killed by SIGSEGV)"),
        (cli.NONFINITE, "error: halted after step 3", "halted after step 3 (status 72)"),
        (cli.CRASHED, "Traceback:\nValueError: x", "ValueError: x (status 70)"),
    ],
)
def test_an_ablation_of_which_runs_failed_ends_with_the_status_of_the_first(
    data, tmp_path, capsys, monkeypatch, status, said, why
):
    statuses = iter([status, cli.RESTART])

    def failing(command, log, *others):
        log.write_text(f"$ python train.py\n{said}\n")
        return next(statuses)

    monkeypatch.setattr(child, "run", failing)
    monkeypatch.setattr(session, "_can_draw", lambda: False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert ablate.run(arguments(data, tmp_path, "ma:1x2,tp:2x1")) == (128 - status if status < 0 else status)
    out, err = capsys.readouterr()
    assert f"1/2 ma:1x2: failed: {why}" in out and "training: 4 steps of" in (tmp_path / "ablation.md").read_text()
    assert err == "error: 2 failed, of 2 runs: ma:1x2, tp:2x1; see above\n"
    assert read(tmp_path)["failed"].keys() == {"ma:1x2", "tp:2x1"} and read(tmp_path)["failed"]["ma:1x2"].startswith(
        why
    )


def test_a_second_ablation_in_its_folder_is_refused(data, tmp_path, capsys):
    with Lock(tmp_path):
        assert ablate.run(arguments(data, tmp_path, "ma:1x2,tp:2x1")) == cli.USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: --workdir: {tmp_path} is in use by process ")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.slow
def test_cut_off_it_goes_on_and_a_run_that_fails_does_not_stop_it(data, tmp_path):
    folder = tmp_path / "ablation"
    # Of two devices that there are ma:2x2 takes four.
    command = arguments(data, folder, "ma:2x2,ma:1x1,zero:1x2", train__steps=200, train__accumulation=2)
    command = [sys.executable, "-m", "maxsep.ablate", *command[1:]]
    environment = kill.environment() | QUICK | {"JAX_NUM_CPU_DEVICES": "2"}

    def started():
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def until(holds):
        end = time.monotonic() + kill.LIMIT
        while not holds():
            assert time.monotonic() < end and ablation.poll() is None
            time.sleep(0.02)

    rows = folder / "ma-1x1" / "metrics.jsonl"
    ablation = started()
    until(lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 3)
    ablation.send_signal(signal.SIGKILL)
    ablation.communicate()
    while running(f"--workdir={folder / 'ma-1x1'}"):
        time.sleep(0.02)
    assert "SIGTERM: stopped after step" in (folder / "ma-1x1" / "log.txt").read_text().splitlines()[-1]
    first = [json.loads(line)["loss"] for line in rows.read_text().splitlines()]
    assert 3 <= len(first) < 200

    ablation = started()
    until(lambda: (folder / "zero-1x2" / "metrics.jsonl").exists())
    ablation.send_signal(signal.SIGTERM)
    out, _ = ablation.communicate(timeout=kill.LIMIT)
    assert ablation.returncode == cli.STOPPED, out
    assert out.splitlines()[-1] == "error: SIGTERM: stopped; the same command resumes from there"
    assert "not run yet: zero:1x2" in (folder / "ablation.md").read_text()
    assert running(str(folder)) == []

    out, _ = (ablation := started()).communicate(timeout=kill.LIMIT)
    assert ablation.returncode == cli.USER_ERROR, out
    assert out.splitlines()[-1] == "error: 1 failed, of 3 runs: ma:2x2; see above"
    assert "2/3 ma:1x1: has finished" in out and "all losses agree to 1e-09" in out
    found = read(folder)
    assert found["failed"].keys() == {"ma:2x2"}
    assert "takes at most 2 x simulated CPU device" in found["failed"]["ma:2x2"]
    for run in found["runs"]:
        assert run["steps"] == list(range(1, 201))
    assert [one["shape"]["context"] for one in found["runs"][0]["decode"]] == [8, 16, 32, 64]
    assert found["runs"][0]["losses"][: len(first)] == first
