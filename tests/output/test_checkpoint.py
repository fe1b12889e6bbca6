"""Checkpoints: the saved bits come back on any mesh, nothing is lost by a kill, and nothing wrong loads in silence."""

import gc
import glob
import itertools
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import kill
import numpy as np
import pytest
from states import abstract, bits, filled, mesh_of, model

from maxsep.config import ConfigError
from maxsep.output.checkpoint import Checkpoints, SaveError


@pytest.mark.parametrize("attention, expert", [(4, 4), (1, 1), (2, 8)])
def test_restores_the_bits_on_any_mesh(tmp_path, attention, expert):
    saved = filled(abstract(mesh_of(4, 4)), 0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, saved, {"position": 112})
        shapes = abstract(mesh_of(attention, expert))
        restored, data, _ = checkpoints.restore(shapes)
    assert bits(restored) == bits(saved)
    assert data == {"position": 112}
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for got, asked in zip(jax.tree.leaves(restored), jax.tree.leaves(shapes), strict=True):
        assert got.sharding == asked.sharding


def test_float64(tmp_path):
    with jax.enable_x64(True), Checkpoints(tmp_path) as checkpoints:
        shapes = abstract(mesh_of(2, 2), dtype=jnp.float64)
        saved = filled(shapes, 1)
        checkpoints.save(1, saved, {})
        assert bits(checkpoints.restore(shapes).state) == bits(saved)


def test_a_large_replicated_array_is_written_by_several_devices(tmp_path, monkeypatch):
    monkeypatch.setattr("maxsep.output.saved_step.SHARED_WRITE_BYTES", 1024)
    shapes = abstract(mesh_of(4, 4))
    saved = filled(shapes, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved, {})
        assert bits(checkpoints.restore(shapes).state) == bits(saved)


def test_state_is_donated_while_it_is_saved(tmp_path):
    shapes = abstract(mesh_of(4, 4), rows=2**14)
    zero = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), donate_argnums=0)
    state = advance(zero)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, state, {})
            for _ in range(3):
                state = advance(state)
            restored, _, _ = checkpoints.restore(shapes, step)
            assert all(np.all(np.asarray(x) == 3 * step - 2) for x in jax.tree.leaves(restored))
            # What was restored may be donated too, also where its replicas share memory.
            advanced = advance(advance(restored))
            assert all(
                np.all(np.asarray(shard.data) == 3 * step)
                for x in jax.tree.leaves(advanced)
                for shard in x.addressable_shards
            )


def test_keeps_the_latest_two_and_the_best(tmp_path):
    shapes = abstract(mesh_of(1, 1))
    state = filled(shapes, 3)
    losses = {1: 9.0, 2: 3.0, 3: None, 4: float("nan"), 5: 4.0, 6: 6.0, 7: None}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() is None and checkpoints.all_steps() == []
        for step, loss in losses.items():
            checkpoints.save(step, state, {})
            checkpoints.evaluated(step, loss)
            best = [s for s in range(1, step + 1) if losses[s] is not None and losses[s] < 9] or [1]
            expected = {min(best, key=lambda s: losses[s]), step - 1, step} - {0}
            checkpoints.wait()  # on disk, not only in memory
            assert {int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()} == expected
            assert checkpoints.all_steps() == sorted(expected)
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([2, 6, 7], 2)
        checkpoints.save(8, state, {})
        checkpoints.evaluated(8, 1.0)
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([2, 7, 8], 8)
        checkpoints.save(9, state, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["8", "9"]


def test_without_evaluations_keeps_the_latest_two(tmp_path):
    state = filled(abstract(mesh_of(1, 1)), 4)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {})
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([2, 3], None)


def test_saving_a_step_again_does_nothing(tmp_path):
    shapes = abstract(mesh_of(1, 1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, filled(shapes, 5), {"position": 1})
        checkpoints.save(1, filled(shapes, 6), {"position": 2})
        restored, data, _ = checkpoints.restore(shapes)
    assert (bits(restored), data) == (bits(filled(shapes, 5)), {"position": 1})


def test_the_model_alone(tmp_path):
    mesh = mesh_of(4, 4)
    state = filled(abstract(mesh), 7)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    elsewhere = model(abstract(mesh_of(2, 8)))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert bits(checkpoints.restore_model(elsewhere).state) == bits(model(state))
        with pytest.raises(ConfigError, match=r"params\.layers\.scale is float32\[2, 32\] there and missing in this"):
            elsewhere["params"]["layers"].pop("scale")
            checkpoints.restore_model(elsewhere)


def test_read_only_makes_nothing(tmp_path):
    with Checkpoints(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.all_steps() == []
        with pytest.raises(ConfigError, match="no checkpoint in"):
            checkpoints.restore(abstract(mesh_of(1, 1)))
    assert list(tmp_path.iterdir()) == []


def changed(mesh, change):
    state = abstract(mesh)
    change(state)
    return state


def with_shape(state):
    state.params["embedding"] = abstract(mesh_of(4, 4), rows=128).params["embedding"]


def with_dtype(state):
    wide = state.params["layers"]["scale"]
    state.params["layers"]["scale"] = jax.ShapeDtypeStruct(wide.shape, jnp.bfloat16, sharding=wide.sharding)


def with_extra(state):
    state.params["layers"]["bias"] = state.params["layers"]["scale"]


def with_missing(state):
    state.params["blocks"].pop()


@pytest.mark.parametrize(
    "change, message",
    [
        (with_shape, r"params\.embedding is float32\[64, 32\] there and float32\[128, 32\] in this model"),
        (with_dtype, r"params\.layers\.scale is float32\[2, 32\] there and bfloat16\[2, 32\] in this model"),
        (with_extra, r"params\.layers\.bias is missing there and float32\[2, 32\] in this model"),
        (with_missing, r"params\.blocks\.1 is uint32\[16\] there and missing in this model"),
    ],
)
def test_another_model_is_refused_by_the_leaf(tmp_path, change, message):
    mesh = mesh_of(4, 4)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, filled(abstract(mesh), 8), {})
        with pytest.raises(ConfigError, match=rf"^checkpoint of step 3 in {tmp_path}: {message}$"):
            checkpoints.restore(changed(mesh, change))


def test_a_step_that_is_not_there_is_refused(tmp_path):
    shapes = abstract(mesh_of(1, 1))
    with Checkpoints(tmp_path) as checkpoints:
        for step in (4, 5):
            checkpoints.save(step, filled(shapes, 9), {})
        with pytest.raises(ConfigError, match=rf"^step: got 3; {tmp_path} has 4, 5$"):
            checkpoints.restore(shapes, 3)


@pytest.mark.parametrize("damage", ["truncated", "metadata", "data", "empty"])
def test_an_unreadable_checkpoint_is_named_in_one_line(tmp_path, damage):
    shapes = abstract(mesh_of(4, 4))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, filled(shapes, 10), {"position": 5})
    if damage == "truncated":
        for path in (tmp_path / "2" / "state").rglob("d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "metadata":
        (tmp_path / "2" / "state" / "_METADATA").write_text("{")
    elif damage == "data":
        (tmp_path / "2" / "data" / "metadata").write_text("{")
    else:
        shutil.rmtree(tmp_path / "2" / "state")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ConfigError) as caught:
        checkpoints.restore(shapes, 2)
    assert str(caught.value).startswith(f"checkpoint of step 2 in {tmp_path} is damaged: ")
    assert "\n" not in str(caught.value)


def test_a_failed_save_is_told_and_the_next_one_succeeds(tmp_path):
    shapes = abstract(mesh_of(4, 4))
    states = [filled(shapes, seed) for seed in range(3)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, states[0], {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as a full disk
        try:
            with pytest.raises(SaveError, match=rf"^checkpoint of step 2 was not saved in {tmp_path}: .+$"):
                checkpoints.save(2, states[1], {})
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            gc.collect()  # here, and not in the midst of another test, Orbax's writers print why they failed
        assert checkpoints.all_steps() == [1]
        checkpoints.save(3, states[2], {})
        assert bits(checkpoints.restore(shapes).state) == bits(states[2])
        assert bits(checkpoints.restore(shapes, 1).state) == bits(states[0])


@pytest.mark.parametrize("there", ["nothing", "a file"])
def test_a_folder_that_has_gone_is_told_and_used_when_it_is_there_again(tmp_path, there):
    """And nothing waits for it: neither a thread, at the program's end, nor the next save."""
    shapes = abstract(mesh_of(1, 1))
    state, before = filled(shapes, 12), set(threading.enumerate())
    folder = tmp_path / "run" / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        folder.parent.rename(tmp_path / "gone")
        if there == "a file":
            folder.parent.write_text("")
        with pytest.raises(SaveError, match=rf"^checkpoint of step 2 was not saved in {folder}: "):
            checkpoints.save(2, state, {})
            checkpoints.wait()
        if there == "a file":
            folder.parent.unlink()
        folder.parent.mkdir()
        checkpoints.save(3, state, {})
        assert checkpoints.all_steps() == [3]
    left = [thread.name for thread in set(threading.enumerate()) - before if not thread.daemon]
    assert [name for name in left if not name.startswith("asyncio")] == []  # which wait for no one at the end


def test_a_folder_that_vanishes_is_told(tmp_path):
    directory = tmp_path / "checkpoints"
    state = filled(abstract(mesh_of(1, 1)), 11)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, state, {})
        while not (directory / "1").exists():
            time.sleep(0.01)
        shutil.rmtree(directory)
        with pytest.raises(SaveError, match="checkpoint of step 1 was not saved"):
            checkpoints.wait()


def state_of(shapes, step):
    """A state of which every number tells the step."""
    return jax.tree.map(lambda x: jax.device_put(np.full(x.shape, step % 128, x.dtype), x.sharding), shapes)


def large():
    return abstract(mesh_of(4, 4), rows=2**13)


def save_for_ever(directory):
    shapes = large()
    with Checkpoints(directory) as checkpoints:
        for step in itertools.count(max(checkpoints.all_steps(), default=0) + 1):
            checkpoints.save(step, state_of(shapes, step), {"position": step})
            checkpoints.evaluated(step, float(step % 5))


@pytest.mark.parametrize("moment", ["retention", pytest.param("save", marks=pytest.mark.slow)])
def test_a_kill_inside_a_save_leaves_whole_checkpoints(tmp_path, moment):
    # Four steps in, so that retention has begun; then the next time the folder shows the moment asked for.
    pattern = "*.orbax-checkpoint-tmp" if moment == "save" else "trash/*"
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    )
    try:
        while not any(p.name.isdigit() and int(p.name) >= 4 for p in tmp_path.iterdir()):
            assert process.poll() is None
            time.sleep(0.01)
        # Not pathlib's glob, which fails where a folder vanishes meanwhile.
        assert kill.held_at(process, lambda: any(glob.iglob(pattern, root_dir=tmp_path)))
    finally:
        process.kill()
        process.wait()
    assert any(glob.iglob(pattern, root_dir=tmp_path))
    shapes = large()
    with Checkpoints(tmp_path) as checkpoints:
        steps = checkpoints.all_steps()
        assert len(steps) >= 2
        for step in steps:
            restored, data, _ = checkpoints.restore(shapes, step)
            assert data == {"position": step} and bits(restored) == bits(state_of(shapes, step))
        following = steps[-1] + 1
        checkpoints.save(following, state_of(shapes, following), {})
        assert checkpoints.all_steps()[-1] == following
    assert all(path.name.isdigit() for path in tmp_path.iterdir()), "leftovers of the kill are swept"


if __name__ == "__main__":
    save_for_ever(Path(sys.argv[1]))
