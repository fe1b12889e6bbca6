"""A run that was killed or stopped goes on to the bits of the run that never was."""

import signal

import kill
import pytest

from maxsep.config import cli

STEPS = 9


def compiling(process):
    return process.printed[-1:] == ["compiling the train step …"]


def before_the_first_checkpoint(process):
    return last_line(process).startswith("step ") and not process.saved and not process.saving


def in_a_save(process):
    return process.saving


def in_a_step(process):
    """After a checkpoint, so that steps that were done are done again."""
    done = [int(line.split()[1].split("/")[0]) for line in [last_line(process)] if line.startswith("step ")]
    return not process.saving and 0 < process.saved < sum(done)


def in_an_evaluation(process):
    return last_line(process).startswith("evaluating")


def after_the_last_step(process):
    """Saved, with the result not yet written."""
    return process.saved == STEPS and not (process.workdir / "summary.json").exists()


def last_line(process):
    return (process.printed or [""])[-1]


MOMENTS = [before_the_first_checkpoint, in_a_save, in_a_step, in_an_evaluation, after_the_last_step]
VARIANTS = {
    "dropless": {},
    "capacity": {"model__capacity_factor": 1.0, "model__capacity_group": 16, "model__expert_dropout": 0.1},
    "accumulation": {"train__accumulation": 2, "model__scan_layers": False},
    "zero1": {"optimizer__zero1": True, "model__remat": "full", "model__dtype": "bfloat16"},
}


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """An empty cache of compiled programs."""
    folder = tmp_path / "programs"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    return folder


def same(run, reference):
    assert kill.figures(run) == kill.figures(reference)
    assert kill.state(run) == kill.state(reference)


def killed_at_each(moments, folder, **changed):
    """Two runs: one in one go, and one that was killed at each moment in turn."""
    flags = kill.flags(kill.text(folder), **changed)
    kill.train(folder / "whole", *flags)
    for moment in moments:
        kill.killed(folder / "run", moment, *flags)
    assert f"this run has finished its {STEPS} steps" in "\n".join(kill.train(folder / "run", *flags))
    return folder / "run", folder / "whole"


def test_killed_in_every_phase(tmp_path, programs):
    """The whole run compiles its programs, the other reads them from the cache."""
    same(*killed_at_each(MOMENTS, tmp_path))
    assert len(list(programs.glob("jit_train_step-*-cache"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_in_every_phase_whatever_the_config(tmp_path, programs, variant):
    same(*killed_at_each([compiling, *MOMENTS], tmp_path, **VARIANTS[variant]))


@pytest.mark.slow
def test_killed_at_any_time(tmp_path, programs):
    """Again and again, a little later each time, wherever that is."""
    flags = kill.flags(kill.text(tmp_path))
    kill.train(tmp_path / "whole", *flags)
    seconds = 2.0
    while kill.killed_after(tmp_path / "run", seconds, *flags):
        seconds += 0.25
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("attention", "expert"),
    [(4, 1), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in [(1, 1), (1, 4), (4, 4), (2, 1)])],
)
def test_killed_and_restarted_on_another_mesh(tmp_path, attention, expert):
    flags = kill.flags(kill.text(tmp_path), train__steps=24)
    kill.train(tmp_path / "whole", *flags)
    kill.killed(tmp_path / "run", in_a_step, *flags)
    printed = kill.train(
        tmp_path / "run", *flags, f"--config.mesh.attention={attention}", f"--config.mesh.expert={expert}"
    )
    assert any(line.startswith("going on from step 3 in ") for line in printed)
    whole, run = (kill.figures(tmp_path / name) for name in ("whole", "run"))
    assert whole.keys() == run.keys()
    for key in whole:
        assert run[key]["loss"] == pytest.approx(whole[key]["loss"], rel=1e-5)
    assert whole[24, "train"]["loss"] < whole[1, "train"]["loss"] - 1


@pytest.mark.slow
@pytest.mark.parametrize("moment", [compiling, in_a_save, in_an_evaluation])
def test_sigterm_in_any_phase_saves_and_goes_on(tmp_path, moment):
    flags = kill.flags(kill.text(tmp_path))
    kill.train(tmp_path / "whole", *flags)
    process = kill.signalled(tmp_path / "run", moment, signal.SIGTERM, *flags)
    assert process.ended() == cli.STOPPED and 0 < process.saved < STEPS
    where = "in the evaluation after" if moment is in_an_evaluation else "after"
    assert process.printed[-1].startswith(f"error: SIGTERM: stopped {where} step {process.saved}, saved;")
    kill.train(tmp_path / "run", *flags)
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_cached_program_cut_short_by_a_kill_is_compiled_anew(tmp_path, programs):
    flags = kill.flags(kill.text(tmp_path))
    kill.train(tmp_path / "whole", *flags)
    for path in programs.glob("*-cache"):
        path.write_bytes(path.read_bytes()[:1000])
    printed = "\n".join(kill.train(tmp_path / "run", *flags))
    assert "Error reading persistent compilation cache entry for 'jit_train_step'" in printed
    same(tmp_path / "run", tmp_path / "whole")
