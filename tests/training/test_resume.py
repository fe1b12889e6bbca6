"""A run that was killed or stopped goes on to the bits of the run that never was."""

import shutil
import signal

import kill
import pytest
from small import named

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


MOMENTS = [compiling, before_the_first_checkpoint, in_a_save, in_a_step, in_an_evaluation, after_the_last_step]
VARIANTS = {
    "capacity, dropout, accumulation, layers unrolled": {
        "model__capacity_factor": 1.0,
        "model__capacity_group": 16,
        "model__expert_dropout": 0.1,
        "train__accumulation": 2,
        "model__scan_layers": False,
    },
    "a pipeline, dropout, zero1, remat, bfloat16": {
        "layout": "tp_pp",
        "mesh__stage": 2,
        "mesh__expert": 1,
        "train__accumulation": 2,
        "model__layers": 2,
        "model__expert_dropout": 0.1,
        "optimizer__zero1": True,
        "model__remat": "full",
        "model__dtype": "bfloat16",
        "model__router_bias_rate": 0.01,
        "model__balance_over": "batch",
    },
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """On one device: programs of several simulated ones are not kept, and each start would compile them."""
    alone = {"mesh__attention": 1, "mesh__expert": 1}
    return kill.flags(kill.text(tmp_path_factory.mktemp("text")), **alone, model__router_bias_rate=0.01)


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run of these flags in one go. It compiles its programs into `whole.parent / "programs"`."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trained_with(folder.parent / "programs", folder, *flags)
    return folder


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """An empty cache of compiled programs."""
    folder = tmp_path / "programs"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    return folder


def trained_with(programs, folder, *flags):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
        return kill.train(folder, *flags)


def same(run, reference):
    assert kill.figures(run) == kill.figures(reference)
    assert kill.state(run) == kill.state(reference)


def killed_at_each(moments, folder, flags):
    """A run that was killed at each moment in turn, and then went on to its end."""
    for moment in moments:
        kill.killed(folder, moment, *flags)
    printed = "\n".join(kill.train(folder, *flags))
    assert (f"this run has finished its {STEPS} steps" in printed) == (moments[-1] is after_the_last_step)


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param([in_a_save, in_a_step], id="two"),
        pytest.param(
            [before_the_first_checkpoint, in_an_evaluation, after_the_last_step],
            id="three more",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_in_every_phase(tmp_path, flags, whole, monkeypatch, moments):
    """The whole run compiles its programs, the other reads them from the cache, which takes no time to be killed in."""
    programs = whole.parent / "programs"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
    killed_at_each(moments, tmp_path / "run", flags)
    same(tmp_path / "run", whole)
    assert len(list(programs.glob("jit_train_step-*-cache"))) == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_killed_in_every_phase_whatever_the_config(tmp_path, programs, variant):
    """On four devices, whose programs are not kept."""
    flags = kill.flags(kill.text(tmp_path), **variant)
    killed_at_each(MOMENTS, tmp_path / "run", flags)
    kill.train(tmp_path / "whole", *flags)
    same(tmp_path / "run", tmp_path / "whole")
    assert list(programs.glob("*-cache")) == []


@pytest.mark.parametrize(
    "times",
    [pytest.param(1.5, marks=pytest.mark.slow), pytest.param(1.05, marks=pytest.mark.exhaustive)],
    ids=lambda times: f"x {times}",
)
def test_killed_at_any_time(tmp_path, programs, flags, whole, times):
    """Again and again, wherever that is, after `times` as long each time: not many times, however slow the machine."""
    seconds = 2.0
    while kill.killed_after(tmp_path / "run", seconds, *flags):
        seconds *= times
    same(tmp_path / "run", whole)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Flags of a run in float64, the run in one go, and one that was killed on the way."""
    folder = tmp_path_factory.mktemp("moved")
    flags = kill.flags(kill.text(folder), train__steps=24, model__dtype="float64", model__router_bias_rate=0.01)
    kill.train(folder / "whole", *flags)
    kill.killed(folder / "killed", in_a_step, *flags)
    return flags, folder / "whole", folder / "killed"


@pytest.mark.exhaustive  # the slow suite moves a run between layouts and meshes in test_layouts.py
@pytest.mark.parametrize("mesh", [(1, 1), (4, 4), (1, 4), (4, 1), (2, 1)], ids=named)
def test_killed_and_restarted_on_another_mesh(tmp_path, moved, mesh):
    flags, whole, killed = moved
    run = shutil.copytree(killed, tmp_path / "run")
    printed = kill.train(run, *flags, f"--config.mesh.attention={mesh[0]}", f"--config.mesh.expert={mesh[1]}")
    assert any(line.startswith("resuming from step ") for line in printed)
    whole, run = ({at: row["loss"] for at, row in kill.figures(folder).items()} for folder in (whole, run))
    assert run == pytest.approx(whole, rel=1e-12)
    assert whole[24, "train"] < whole[1, "train"] - 1


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(compiling, marks=pytest.mark.exhaustive),
        pytest.param(in_a_save, marks=pytest.mark.slow),
        pytest.param(in_an_evaluation, marks=pytest.mark.exhaustive),
    ],
)
def test_sigterm_in_any_phase_saves_and_goes_on(tmp_path, flags, whole, moment):
    def before_the_last_step(process):
        return moment(process) and not any(line.startswith(f"step {STEPS}/") for line in process.printed)

    process = kill.signalled(tmp_path / "run", before_the_last_step, signal.SIGTERM, *flags)
    assert process.ended() == cli.STOPPED and 0 < process.saved < STEPS
    where = "in the evaluation after" if moment is in_an_evaluation else "after"
    assert process.printed[-1].startswith(f"error: SIGTERM: stopped {where} step {process.saved}, saved;")
    kill.train(tmp_path / "run", *flags)
    same(tmp_path / "run", whole)


@pytest.fixture
def programs_cut_short(whole, tmp_path, monkeypatch):
    """The whole run's compiled programs, each cut off after 1,000 bytes; mended when the test is done.

    They are cut where they lie: JAX 0.10 knows a program by the folder of the cache, too.
    """
    programs = whole.parent / "programs"
    kept = shutil.copytree(programs, tmp_path / "kept")
    for path in programs.glob("*-cache"):
        path.write_bytes(path.read_bytes()[:1000])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
    yield
    shutil.rmtree(programs)
    kept.rename(programs)


@pytest.mark.slow
@pytest.mark.usefixtures("programs_cut_short")
def test_a_cached_program_cut_short_by_a_kill_is_compiled_anew(tmp_path, flags, whole):
    printed = "\n".join(kill.train(tmp_path / "run", *flags))
    assert "Error reading persistent compilation cache entry for 'jit_train_step'" in printed
    same(tmp_path / "run", whole)
