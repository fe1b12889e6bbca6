"""Damage to a checkpoint's files never loads in silence: it is told, and the step before it is taken."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from states import abstract, bits, filled, mesh_of, model

from maxsep.config import ConfigError
from maxsep.config.checksum import checksum
from maxsep.output.checkpoint import Checkpoints, NotFinite


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two steps, and the folder they lie in; step 2 is the better one."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    states = {step: filled(abstract(mesh_of(1, 1)), step) for step in (1, 2)}
    with Checkpoints(folder) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"position": 10 * step})
            checkpoints.evaluated(step, 3.0 - step)
    return folder, {step: (bits(state), {"position": 10 * step}) for step, state in states.items()}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def taken(folder: Path, saved: dict, capsys) -> int:
    """The step that a run would go on from, which is as it was saved; an older one is told."""
    with Checkpoints(folder, read_only=True) as checkpoints:
        state, data, step = checkpoints.restore(abstract(mesh_of(1, 1)))
        assert checkpoints.best_step() in (1, 2)
    same = (bits(state), data) == saved[step]
    assert same, f"step {step} is not what was saved"
    told = capsys.readouterr().out
    assert (f"warning: checkpoint of step 2 in {folder} is damaged: " in told) == (step == 1), told
    others = [line for line in told.splitlines() if "warning: step 2 has no held-out loss: " not in line]
    assert len(others) == (step == 1), told
    return step


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flips(whole, tmp_path, capsys, count: int) -> int:
    """Flips bits of step 2, one at a time, any file being as likely as any other; how often step 1 was taken."""
    folder, saved = whole
    seed = random.randrange(2**32)
    dice, older = random.Random(seed), 0
    for number in range(count):
        trial = tmp_path / str(number) / "checkpoints"
        shutil.copytree(folder, trial)
        # As many in the small files as in the arrays.
        path = dice.choice([path for path in files(trial / "2") if path.stat().st_size])
        bit = dice.randrange(8 * path.stat().st_size)
        where = f"seed {seed}, number {number}: bit {bit} of {path.relative_to(trial)}"
        flip(path, bit)
        try:
            older += taken(trial, saved, capsys) == 1
        except BaseException as e:
            raise AssertionError(where) from e
        shutil.rmtree(trial.parent)
    with capsys.disabled():
        print(f" seed {seed}: {count} flips, {older} seen, the others changed nothing that is read ", end="")
    return older


def test_flipped_bits_of_arrays_are_seen(whole, tmp_path, capsys):
    """In the middle of the files that hold arrays; some also hold what nobody reads."""
    folder, saved = whole
    older = []
    for number, path in enumerate(p for p in files(folder / "2" / "state") if p.parent.name == "d"):
        trial = tmp_path / str(number)
        shutil.copytree(folder, trial)
        flip(trial / path.relative_to(folder), 8 * (path.stat().st_size // 2))
        older.append(taken(trial, saved, capsys) == 1)
    assert any(older)


@pytest.mark.slow
def test_flipped_bits_never_load(whole, tmp_path, capsys):
    assert flips(whole, tmp_path, capsys, 20) > 0


@pytest.mark.exhaustive
def test_many_flipped_bits_never_load(whole, tmp_path, capsys):
    assert flips(whole, tmp_path, capsys, 200) > 0


def empty(path):
    path.write_bytes(b"")


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [empty, halve, Path.unlink])
def test_no_file_that_is_cut_short_or_gone_changes_what_loads(whole, tmp_path, capsys, damage):
    folder, saved = whole
    older = []
    for number, path in enumerate(files(folder / "2")):
        trial = tmp_path / str(number)
        shutil.copytree(folder, trial)
        damage(trial / path.relative_to(folder))
        if taken(trial, saved, capsys) == 1:
            older.append(str(path.relative_to(folder / "2")))
    assert {"data/metadata", "state/_METADATA"} <= set(older)


def test_none_that_is_whole_is_refused(whole, tmp_path):
    folder, _ = whole
    trial = tmp_path / "checkpoints"
    shutil.copytree(folder, trial)
    for step in "12":
        (trial / step / "data" / "metadata").write_text("{}")
    with Checkpoints(trial, read_only=True) as checkpoints:
        with pytest.raises(
            ConfigError, match=rf"^workdir: {trial} has no checkpoint that is whole: checkpoint of step 2"
        ):
            checkpoints.restore(abstract(mesh_of(1, 1)))
        with pytest.raises(ConfigError, match=rf"^checkpoint of step 1 in {trial} is damaged: its record"):
            checkpoints.restore(abstract(mesh_of(1, 1)), 1)


def test_a_run_that_goes_on_saves_the_step_again(whole, tmp_path, capsys):
    folder, saved = whole
    trial = tmp_path / "checkpoints"
    shutil.copytree(folder, trial)
    for path in (trial / "2" / "state").rglob("d/*"):
        flip(path, 8 * (path.stat().st_size // 2))
    with Checkpoints(trial) as checkpoints:
        assert checkpoints.restore(abstract(mesh_of(1, 1))).step == 1
        checkpoints.go_on_from(1)
        assert checkpoints.all_steps() == [1]
        checkpoints.save(2, filled(abstract(mesh_of(1, 1)), 2), {"position": 20})
        assert (bits(checkpoints.restore(abstract(mesh_of(1, 1))).state), {"position": 20}) == saved[2]
    assert [path.name[:2] for path in (trial / "damaged").iterdir()] == ["2-"]
    assert "warning: moved to " in capsys.readouterr().out


def test_another_state_of_the_same_shapes_is_damage(whole, tmp_path, capsys):
    """Files of another step in its place."""
    folder, saved = whole
    trial = tmp_path / "checkpoints"
    shutil.copytree(folder, trial)
    for part in ("state", "data"):
        shutil.copytree(folder, trial, dirs_exist_ok=True)
        shutil.rmtree(trial / "2" / part)
        shutil.copytree(folder / "1" / part, trial / "2" / part)
        assert taken(trial, saved, capsys) == 1


def test_what_another_version_saved_is_refused(whole, tmp_path):
    folder, _ = whole
    trial = tmp_path / "checkpoints"
    shutil.copytree(folder, trial)
    path = trial / "2" / "data" / "metadata"
    content = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("files", "checksum")}
    path.write_text(json.dumps(content | {"checksum": checksum(content)}))
    with Checkpoints(trial) as checkpoints:
        with pytest.raises(ConfigError, match=rf"^{trial}/2 was saved by another version of maxsep, "):
            checkpoints.restore(abstract(mesh_of(1, 1)))
        assert checkpoints.all_steps() == [1, 2]


def test_what_is_not_finite_is_not_saved(tmp_path):
    state = filled(abstract(mesh_of(2, 2)), 0)
    scale = np.array(state.params["layers"]["scale"])
    scale[1, 3] = np.inf
    wrong = jax.device_put(scale, state.params["layers"]["scale"].sharding)
    params = {**state.params, "layers": {**state.params["layers"], "scale": wrong}}
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(NotFinite, match=r"^the state after step 3 is not finite: params\.layers\.scale$"):
            checkpoints.save(3, replace(state, params=params), {})
        assert checkpoints.all_steps() == []


def test_the_cast_of_what_was_read_in_parts(whole, monkeypatch):
    monkeypatch.setattr("maxsep.output.saved_step.AT_ONCE_BYTES", 1000)
    folder, _ = whole
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, np.float16 if x.dtype == np.float32 else x.dtype, sharding=x.sharding),
        model(abstract(mesh_of(2, 2))),
    )
    with Checkpoints(folder, read_only=True) as checkpoints:
        got = checkpoints.restore_model(wanted, cast=True).state
        exact = checkpoints.restore_model(model(abstract(mesh_of(2, 2)))).state
    jax.tree.map(lambda a, b, c: np.testing.assert_array_equal(a, b.astype(c.dtype)), got, exact, wanted)
