"""A run that was killed or stopped goes on to the bits of the run that never was."""

import kill


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
    return process.saved == 9 and not (process.workdir / "summary.json").exists()


def last_line(process):
    return (process.printed or [""])[-1]


MOMENTS = [compiling, before_the_first_checkpoint, in_a_save, in_a_step, in_an_evaluation, after_the_last_step]


def same(run, reference):
    assert kill.figures(run) == kill.figures(reference)
    assert kill.state(run) == kill.state(reference)


def test_killed_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    flags = kill.flags(kill.text(tmp_path))
    kill.train(tmp_path / "whole", *flags)
    run = tmp_path / "run"
    for moment in MOMENTS:
        kill.killed(run, moment, *flags)
    assert "this run has finished its 9 steps" in "\n".join(kill.train(run, *flags))
    same(run, tmp_path / "whole")
