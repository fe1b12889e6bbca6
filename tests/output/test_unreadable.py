"""A checkpoint that cannot be read now is waited for; then the run ends, and the step stays where it is."""

import errno
import os
import shutil
from types import SimpleNamespace

import jax
import orbax.checkpoint as ocp
import pytest
from runs import snapshot
from states import abstract, bits, filled, mesh_of

from maxsep.config import ConfigError, cli, faults
from maxsep.output import record, saved_step
from maxsep.output.checkpoint import Checkpoints


def system(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/disk/file")


def tensorstore(code: str, number: int) -> Exception:
    """As it comes of Orbax, of an array's own bytes."""
    error = Exception("Encountered error while reading array index: (slice(0, 64, 1),). See full TensorStore details")
    error.__cause__ = ValueError(
        f'{code}: Error reading "params.w/0.0" in OCDBT database at local file "/disk/state/": '
        f"Error reading from open file /disk/state/d/12: Failed [tensorstore_spec='{{}}'] [os_error_code='{number}']"
    )
    return error


WORLD, RIGHTS = "can be read another time", "has to be changed by the user"
FAULTS = {
    "EIO": (lambda: system(errno.EIO), WORLD),
    "ESTALE": (lambda: system(errno.ESTALE), WORLD),
    "ENOENT": (lambda: system(errno.ENOENT), WORLD),  # of a file that is there when it is looked for
    "EACCES": (lambda: system(errno.EACCES), RIGHTS),
    "EIO of TensorStore": (lambda: tensorstore("UNKNOWN", errno.EIO), WORLD),
    "ESTALE of TensorStore": (lambda: tensorstore("ABORTED", errno.ESTALE), WORLD),
    "EACCES of TensorStore": (lambda: tensorstore("PERMISSION_DENIED", errno.EACCES), RIGHTS),
    "no memory": (MemoryError, WORLD),
    "no memory of a device": (lambda: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), WORLD),
    "ours": (lambda: TypeError("a fault of ours"), WORLD),
}
PLACES = {
    "record": (record.Record, "read"),
    "metadata": (ocp.PyTreeCheckpointHandler, "metadata"),
    "arrays": (ocp.PyTreeCheckpointHandler, "restore"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, filled(abstract(mesh_of(1, 1)), step), {"position": step})
    return folder


def failing(monkeypatch, place: str, error, times: float) -> None:
    """The first `times` reads of `place` raise `error()`."""
    owner, name = PLACES[place]
    whole, left = getattr(owner, name), [times]

    def fails(*arguments, **options):
        if left[0] > 0:
            left[0] -= 1
            raise error()
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, name, fails)


def restored(folder, job=None) -> int:
    """The step that a run would resume from, which it then has made room for."""
    with Checkpoints(folder) as checkpoints:
        if job is not None:
            checkpoints.job = job
        state, data, step = checkpoints.restore(abstract(mesh_of(1, 1)))
        assert bits(state) == bits(filled(abstract(mesh_of(1, 1)), step)) and data == {"position": step}
        checkpoints.go_on_from(step)
        return step


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", PLACES)
def test_what_cannot_be_read_ends_the_run_and_stays(saved, monkeypatch, capsys, place, fault):
    error, kind = FAULTS[fault]
    before = snapshot(saved)
    failing(monkeypatch, place, error, float("inf"))
    with pytest.raises((cli.Exit, ConfigError)) as caught:
        restored(saved)
    status, line = cli.outcome(caught.value)
    assert status == (cli.USER_ERROR if kind == RIGHTS else cli.RESTART)
    assert line.startswith(f"checkpoint of step 2 in {saved} cannot be read: ") and len(line) < 400
    if faults.number(error()):
        assert os.strerror(faults.number(error())) in line and "/disk/" in line
    assert snapshot(saved) == before


@pytest.mark.parametrize("place", PLACES)
def test_what_can_be_read_a_moment_later_is_waited_for(saved, monkeypatch, capsys, place):
    monkeypatch.setattr(faults, "RETRY_SECONDS", 60.0)
    monkeypatch.setattr(faults, "PAUSES", (0.0, 0.0))
    before = snapshot(saved)
    for error, kind in FAULTS.values():
        if kind == WORLD:
            with monkeypatch.context() as patched:
                failing(patched, place, error, 3)
                assert restored(saved) == 2
            told = capsys.readouterr().out
            assert told.count("\n") == 1 and "; trying again for 60 s\n" in told
    assert snapshot(saved) == before


@pytest.mark.parametrize("late", [True, False])
def test_a_file_that_is_missing_is_waited_for_before_it_is_damage(saved, tmp_path, monkeypatch, capsys, late):
    """As it may be for a client of a network file system that has not listed the folder since."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    hidden = max((folder / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    hidden.rename(tmp_path / "hidden")
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if late and len(looks) == 3:
            (tmp_path / "hidden").rename(hidden)

    now = iter(range(0, 10_000, 10))  # two reads a second apart, and so on
    monkeypatch.setattr(faults, "RETRY_SECONDS", 60.0)
    monkeypatch.setattr(faults, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: next(now)))
    assert restored(folder) == (2 if late else 1)
    assert ("is damaged" in capsys.readouterr().out) != late and len(looks) >= 3
    assert late == (not (folder / "damaged").exists())


class Two:
    """A job of two processes, of which this is one; the other says what `other` makes of this one's word."""

    count, members = 2, ("process 0", "process 1")

    def __init__(self, index: int, other):
        self.first, self.other = index == 0, other

    def agree(self, value, seconds=None):
        return [value, self.other(value)] if self.first else [self.other(value), value]


def test_one_process_of_many_moves_no_step(saved, monkeypatch, tmp_path):
    """What one does not see counts only if the first does not see it either; what one cannot read ends all."""
    kind = saved_step.KINDS.index
    before = snapshot(saved)

    def other_says(answer):
        # To the question whether a part was read; anything else is answered alike.
        return lambda value: answer if value is None else value

    for answer in ([kind(record.Incomplete), "late"], [kind(cli.Exit), "no disk"]):
        with pytest.raises(cli.Exit, match=rf"step 2 .* cannot be read: {answer[1]} \(process 1\); nothing") as caught:
            restored(saved, Two(0, other_says(answer)))
        assert caught.value.status == cli.RESTART
    assert snapshot(saved) == before
    with pytest.raises(
        ConfigError, match=r"no checkpoint that is whole: .* of step 2 .* is damaged: bits \(process 1\)$"
    ):
        restored(saved, Two(0, other_says([kind(record.Damaged), "bits"])))
