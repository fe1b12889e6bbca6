"""Steps whose loss or gradients are not finite: skipped, then rolled back, then the run halts."""

import os
import signal

import kill
import numpy as np
import pytest
from runs import SMALL, at_step, checkpoints, steps

from maxsep.config import cli
from maxsep.data import loader, preparation
from maxsep.data.records import PAD
from maxsep.output.saved_step import Record

BATCH = 8  # of kill.flags


@pytest.fixture(scope="module")
def batches(data):
    """The sum of the ids of each batch that a run of these tests takes, in order: no two are the same."""
    argv = ["train.py", *kill.flags(data, **SMALL)]
    config = cli.parse(argv, lambda values: None, "configs/base.py").config
    corpus = preparation.ensure(config, lambda line: None)
    found = []
    for rows in loader.train_batches(corpus, BATCH, config.train.seed, 0, range(BATCH)):
        found.append(int(np.sum(rows)))
        if len(found) == 16:
            break
    assert len(set(found)) == len(found)
    return found


@pytest.fixture
def poisoned(monkeypatch, batches):
    """Makes the batches of these numbers, from 1 on, ones without a target: their loss is 0 / 0."""
    stack = loader._stack

    def poison(*numbers):
        bad = {batches[number - 1] for number in numbers}

        def poisonous(records, rows):
            found = stack(records, rows)
            return np.full_like(found, PAD) if int(found.sum()) in bad else found

        monkeypatch.setattr(loader, "_stack", poisonous)

    return poison


def parameters(workdir, step):
    return {name: leaf for name, leaf in kill.state(workdir, step).items() if name.startswith("['params']")}


def test_one_is_skipped_and_counted(call, workdir, poisoned):
    poisoned(3)
    status, out, _ = call(workdir, train__steps=5, train__checkpoint_every=1, train__nonfinite_limit=2)
    assert status == cli.DONE
    assert out.count("loss or gradients are not finite; skipped, 1 in a row") == 1
    rows = kill.figures(workdir)
    assert [rows[step, "train"]["skipped_steps"] for step in range(1, 6)] == [0, 0, 1, 1, 1]
    assert {rows[step, "train"]["rollbacks"] for step in range(1, 6)} == {0}
    assert rows[3, "train"]["total_loss"] is None
    assert checkpoints(workdir)[-2:] == [4, 5]


@pytest.mark.parametrize("every", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_several_in_a_row_are_rolled_back_and_their_data_left_out(
    call, workdir, tmp_path, poisoned, monkeypatch, every
):
    """A repeat has the same bits, also one that is stopped before and after."""
    poisoned(5, 6)
    flags = {"train__steps": 7, "train__nonfinite_limit": 2, "train__checkpoint_every": every}
    flags["model__router_bias_rate"] = 0.01
    back = 4 if every == 1 else 3
    status, out, err = call(workdir, **flags)
    assert (status, err) == (cli.DONE, "")
    told = f"rolled back to step {back}, and skips the data of steps {back + 1} to 6 from now on"
    assert f"loss or gradients were not finite 2 steps in a row (train.nonfinite_limit); {told}\n" in out
    rows = kill.figures(workdir)
    assert steps(workdir, "train") == [1, 2, 3, 4, 5, 6, 7]
    assert [rows[step, "train"]["rollbacks"] for step in range(1, 8)] == [0] * back + [1] * (7 - back)
    assert rows[7, "train"]["skipped_steps"] == 0 and all(row["loss"] is not None for row in rows.values())

    again = workdir.with_name("again")
    # Before the rollback, which is therefore made twice, and after it.
    for step in (5,) if every == 1 else (5, 6):
        with monkeypatch.context() as patched:
            signals = iter([signal.SIGTERM])  # the row may be written again, and a second one ends it at once
            at_step(patched, step, lambda signals=signals: [os.kill(os.getpid(), number) for number in signals])
            assert call(again, **flags)[0] == cli.STOPPED
    assert call(again, **flags)[0] == cli.DONE
    assert kill.figures(again) == rows
    assert kill.state(again) == kill.state(workdir)


def test_halts_exactly_at_the_limit(call, workdir, poisoned):
    """With the state before the bad steps, though the next one was under way when they were seen."""
    poisoned(3, 4)
    flags = {"train__nonfinite_limit": 2, "train__checkpoint_every": 3, "train__rollbacks": 0, "train__steps": 8}
    status, _, err = call(workdir, **flags)
    limit = "loss or gradients were not finite 2 steps in a row (train.nonfinite_limit)"
    expected = f"halted after step 4: {limit}, after 0 of 0 rollbacks (train.rollbacks); the state before them is saved"
    assert (status, err) == (cli.NONFINITE, f"error: {expected} in {workdir}\n")
    assert checkpoints(workdir) == [3, 4] and steps(workdir, "train") == [1, 2, 3, 4]
    assert parameters(workdir, 4) == parameters(workdir, 3)
    assert not (workdir / "summary.json").exists()
    assert call(workdir, **flags)[0] == cli.DONE  # the next batches are better
    rows = kill.figures(workdir)
    assert rows[8, "train"]["skipped_steps"] == 2 and len(steps(workdir, "train")) == 8


@pytest.mark.slow
def test_what_stays_bad_halts_after_its_rollbacks(call, workdir, poisoned):
    poisoned(*range(4, 17))
    flags = {"train__nonfinite_limit": 2, "train__checkpoint_every": 1, "train__rollbacks": 2, "train__steps": 9}
    status, out, err = call(workdir, **flags)
    assert status == cli.NONFINITE and out.count("rolled back to step 3") == 2
    assert err.startswith("error: halted after step 5: ") and ", after 2 of 2 rollbacks" in err
    assert steps(workdir, "train") == [1, 2, 3, 4, 5]
    assert parameters(workdir, 5) == parameters(workdir, 4)


@pytest.mark.slow
def test_without_a_checkpoint_before_them_it_halts_at_once(call, workdir, poisoned):
    poisoned(1, 2)
    status, _, err = call(workdir, train__nonfinite_limit=2, train__checkpoint_every=1)
    assert status == cli.NONFINITE
    assert err.startswith("error: halted after step 2: ") and "after 0 of 1 rollbacks" in err


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_rolled_back_and_never_saved(call, workdir, monkeypatch):
    """Though loss and gradients were: what a device has computed wrong."""
    made = Record.of
    found = iter([[], ["params.norm"]])

    def of(*arguments):
        return made(*arguments)[0], next(found, [])

    monkeypatch.setattr(Record, "of", of)
    status, out, err = call(workdir, train__steps=6, train__checkpoint_every=2)
    assert (status, err) == (cli.DONE, "")
    assert (
        "the state after step 4 is not finite: params.norm; rolled back to step 2, and skips the data of steps 3" in out
    )
    assert checkpoints(workdir) == [4, 6] and steps(workdir, "train") == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_rates_that_no_float32_holds_halt(call, workdir):
    flags = {"optimizer__learning_rate": 1e30, "train__nonfinite_limit": 2, "train__checkpoint_every": 1}
    status, out, err = call(workdir, train__steps=9, model__dtype="float32", **flags)
    assert status == cli.NONFINITE and err.startswith("error: halted after step ")
    assert "skipped, 1 in a row" in out and "skipped, 2 in a row" in out
    last = max(steps(workdir, "train"))
    for step in checkpoints(workdir):
        state = kill.state(workdir, step)
        assert all(
            np.isfinite(np.frombuffer(leaf, np.float32)).all() for name, leaf in state.items() if "params" in name
        )
    assert last < 9 and not (workdir / "summary.json").exists()
