"""Checkpoints of a run: the training state and the data position, saved as one, restored onto any mesh.

Orbax writes in the background and commits a step by renaming its finished folder, so a step is there whole or not at
all. On disk the state is a nested dict of names, whatever classes the program keeps it in.
"""

import logging
import math
import shutil
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from maxsep.cluster.job import ALONE, End, Job
from maxsep.config import ConfigError, cli

TRASH = "trash"  # retention renames a step into it, so that a kill never leaves a step half deleted
ALIKE_SECONDS = 10.0  # in which a save that failed in one process is found to have failed in the others
# Replicas share the writing of an array from this size on, in bytes. Each slice is compiled once for every device, at
# the first save: for small arrays that took 2.2 s of a 16-device run, and saved nothing.
SHARED_WRITE_BYTES = 64 * 2**20


_saving: list["Checkpoints"] = []  # in a job of several processes


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Keeps from stderr what Orbax says of each error there, twice and with pages of traceback, before it raises it.

    It is the first to tell of one in the background: between processes, raising it may wait for the others for ever.
    """
    if "/orbax/" not in record.pathname:
        return True
    if record.exc_info:
        for checkpoints in _saving:
            checkpoints.on_error(record.exc_info[1])
    return False


logging.getLogger("absl").addFilter(_not_of_orbax)


def _unraisable(unraisable, previous=sys.unraisablehook) -> None:
    """Keeps quiet about reads and writes that were still under way when one beside them failed and was told."""
    if str(unraisable.exc_value) != "Event loop is closed":
        previous(unraisable)


sys.unraisablehook = _unraisable


class SaveError(RuntimeError):
    """A save failed; the checkpoints before it are whole. The message is one line."""


class Checkpoints:
    """The checkpoints in one folder: the two latest and the one of the lowest `eval_loss`.

    Args:
        directory: absolute path; made where it is missing, unless `read_only`.
        read_only: only for restoring: makes, removes and tidies nothing.
        job: this process and the others. Where a save fails in one and the others wait for it, the job ends.
    """

    def __init__(self, directory: Path, read_only: bool = False, job: Job = ALONE):
        self.directory, self.job = Path(directory), job
        self._saving: int | None = None
        self._writes = not read_only and jax.process_index() == 0
        self._sweep()
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=_eval_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            # Not `max_to_keep` with `best_fn`: together they delete the latest.
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
            best_fn=_eval_loss,  # metrics are written to disk only where it is set
            best_mode="min",
            todelete_subdir=TRASH,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._sweep),
        )
        registry = type_handlers.create_type_handler_registry(
            (jax.Array, type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED_WRITE_BYTES))
        )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "data": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options)
        if job.count > 1 and not read_only:
            _saving.append(self)

    def save(self, step: int, state, data: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts to save, and returns once the state is copied or its buffers are held: it may then be donated.

        Args:
            step: finished optimizer steps. Nothing is done where it is already saved.
            state: pytree of global jax.Arrays.
            data: JSON values; what the data pipeline needs to go on.
            metrics: {"eval_loss": nats} where an evaluation was made at this step.

        Raises:
            SaveError: the save before this one failed, and this one was not begun; or this one cannot be. Calling
                again tries again.
        """
        if step in self.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(_nested(state)), data=ocp.args.JsonSave(data))
        self._saving = step
        try:
            self._manager.save(step, args=args, metrics=metrics or {}, force=True)
        except Exception as e:
            raise self._failed(e) from e

    def wait(self) -> None:
        """Returns when the save under way is on disk.

        Raises:
            SaveError: it failed.
        """
        try:
            self._manager.wait_until_finished()
            if self._saving is not None and not (self.directory / str(self._saving)).is_dir():
                raise FileNotFoundError("the step's folder has vanished")  # Orbax does not notice
        except Exception as e:
            raise self._failed(e) from e
        self._saving = None

    def close(self) -> None:
        """Waits for the save under way, and ends the background threads.

        Raises:
            SaveError: the save failed.
        """
        try:
            self.wait()
        finally:
            if self in _saving:
                _saving.remove(self)
            self._manager.close()
        self._sweep()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *exc) -> None:
        if kind is not None and jax.process_count() > 1:
            return  # the other processes may never come to where this would wait for them
        try:
            self.close()
        except SaveError:
            if kind is None:  # else the error that ends the run counts, not what it cost
                raise

    def all_steps(self) -> list[int]:
        """The saved steps, ascending. Waits for the save under way."""
        self.wait()
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest saved step. Waits for the save under way."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the lowest `eval_loss` among those that have one. Waits for the save under way."""
        losses = {step: _eval_loss(self._manager.metrics(step) or {}) for step in self.all_steps()}
        evaluated = [step for step, loss in losses.items() if loss < math.inf]
        return min(evaluated, key=lambda step: (losses[step], -step), default=None)

    def restore(self, abstract_state, step: int | None = None):
        """The state and the data position saved at `step`, by default the latest.

        Args:
            abstract_state: the state's pytree with a jax.ShapeDtypeStruct with a NamedSharding, of any mesh, as every
                leaf.

        Returns:
            (state, data): jax.Arrays with the bits that were saved, sharded as asked; they may be donated.

        Raises:
            ConfigError: there is no such step, it cannot be read, or its leaves have other names, shapes or dtypes.
        """
        step = self._existing(step)
        nested = _nested(abstract_state)
        self._check(step, _named(abstract_state), ())
        restored = self._read(step, state=_restore_args(nested), data=ocp.args.JsonRestore())
        return _like(abstract_state, restored.state), restored.data

    def restore_params(self, abstract_params, step: int | None = None, cast: bool = False):
        """As `restore`, of the state's field `params` alone: nothing else is read. `cast`: into other dtypes too."""
        step = self._existing(step)
        wanted = {("params", *path): leaf for path, leaf in _named(abstract_params).items()}
        self._check(step, wanted, ("params",), cast)
        nested = {"params": _nested(abstract_params)}
        restored = self._read(step, state=_restore_args(nested, partial_restore=True))
        return _like(abstract_params, restored.state["params"])

    def _existing(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise ConfigError(f"workdir: no checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise ConfigError(f"step: got {step}; {self.directory} has {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def _check(self, step: int, wanted: dict, prefix: tuple[str, ...], cast: bool = False) -> None:
        """Refuses what Orbax would cast in silence, or complain of in hundreds of lines."""
        try:
            saved = _named(self._manager.item_metadata(step)["state"].tree)
        except Exception as e:
            raise self._unreadable(step, e) from e
        saved = {path: leaf for path, leaf in saved.items() if path[: len(prefix)] == prefix}
        for path in sorted(saved.keys() | wanted.keys()):
            have, want = (_described(leaves.get(path)) for leaves in (saved, wanted))
            same = path in saved and path in wanted and saved[path].shape == wanted[path].shape
            if have != want and not (cast and same):
                where = f"checkpoint of step {step} in {self.directory}"
                raise ConfigError(f"{where}: {'.'.join(path)} is {have} there and {want} in this model")

    def _read(self, step: int, **args):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as e:
            raise self._unreadable(step, e) from e

    def _unreadable(self, step: int, error: Exception) -> ConfigError:
        return ConfigError(f"checkpoint of step {step} in {self.directory} cannot be read: {_one_line(error)}")

    def on_error(self, error: BaseException) -> None:
        """What Orbax says of an error, from any thread: if the save has not ended a while later, it hangs."""
        step = self._saving
        if step is not None:
            timer = threading.Timer(ALIKE_SECONDS, self._end_if_hanging, (step, self._not_saved(step, error)))
            timer.daemon = True
            timer.start()

    def _end_if_hanging(self, step: int, line: str) -> None:
        if self._saving == step and self._manager.is_saving_in_progress():
            self.job.fail(End(cli.SAVE_FAILED, f"{line}; the same command goes on from the checkpoint before it"))

    def _not_saved(self, step: int, error: BaseException) -> str:
        return f"checkpoint of step {step} was not saved in {self.directory}: {_one_line(error)}"

    def _failed(self, error: Exception) -> SaveError:
        step, self._saving = self._saving, None
        if self._writes:  # Orbax leaves what it had written, which the next save may need the room of
            for begun in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(begun, ignore_errors=True)
        if self.directory.is_dir():
            self._manager.reload()  # it listed the step as saved, and those to be removed after it as gone
        return SaveError(self._not_saved(step, error))

    def _sweep(self) -> None:
        if self._writes:
            shutil.rmtree(self.directory / TRASH, ignore_errors=True)


def _eval_loss(metrics: dict) -> float:
    loss = metrics.get("eval_loss")
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _named(tree) -> dict[tuple[str, ...], object]:
    """The leaves by their path: names of fields and keys, numbers of list entries."""

    def name(entry) -> str:
        (value,) = (getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a))
        return str(value)

    return {tuple(map(name, path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _nested(tree) -> dict:
    """`tree` as nested dicts."""
    out: dict = {}
    for path, leaf in _named(tree).items():
        node = out
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return out


def _like(tree, nested: dict):
    """The leaves of `nested` in the structure of `tree`."""
    leaves = _named(nested)
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[path] for path in _named(tree)])


def _restore_args(nested: dict, **options) -> ocp.args.PyTreeRestore:
    # Without a sharding in every leaf Orbax would take the mesh the checkpoint was saved on.
    assert all(isinstance(x.sharding, jax.sharding.NamedSharding) for x in jax.tree.leaves(nested))
    args = ocp.checkpoint_utils.construct_restore_args(nested)
    return ocp.args.PyTreeRestore(item=nested, restore_args=args, **options)


def _described(leaf) -> str:
    return "missing" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _one_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:300]}"
