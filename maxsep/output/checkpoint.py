"""Checkpoints of a run: the training state and the data position, saved as one, restored onto any mesh.

Orbax writes in the background and commits a step by renaming its finished folder, so a step is there whole or not at
all. What a step has to be is kept beside it (saved_step.py) and checked when it is read: a damaged one is told, and the
one before it is taken.
"""

import contextlib
import logging
import math
import shutil
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from maxsep.cluster.job import ALONE, End, Job
from maxsep.config import ConfigError, cli
from maxsep.output import tree
from maxsep.output.console import say
from maxsep.output.saved_step import RECORD, STATE, Arrays, Damaged, Record, SavedStep, Shapes, array_handler, one_line

DAMAGED = "damaged"  # where a run that goes on from an older step puts those that it could not
TRASH = "trash"  # retention renames a step into it, so that a kill never leaves a step half deleted
ALIKE_SECONDS = 10.0  # in which a save that failed in one process is found to have failed in the others


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
# A read that failed beside another one, which is told.
logging.getLogger("asyncio").addFilter(lambda record: "/orbax/" not in record.getMessage())


def _unraisable(unraisable, previous=sys.unraisablehook) -> None:
    """Keeps quiet about reads and writes that were still under way when one beside them failed and was told."""
    if str(unraisable.exc_value) != "Event loop is closed":
        previous(unraisable)


sys.unraisablehook = _unraisable


class SaveError(RuntimeError):
    """A save failed; the checkpoints before it are whole. The message is one line."""


class NotFinite(RuntimeError):
    """A state with entries that are not finite, which is never saved. The message is one line."""


class Restored(NamedTuple):
    """What was read of a step."""

    state: Any  # pytree of jax.Arrays with the bits that were saved, sharded as asked; they may be donated
    data: dict  # JSON values that were saved beside it
    step: int


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
        self._saves = not read_only
        self._writes = self._saves and jax.process_index() == 0
        self._sweep()
        self._losses: dict[int, float] = {}  # of the steps, as far as they were asked for
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(self._loss),
            todelete_subdir=TRASH,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._sweep),
        )
        handlers = {STATE: array_handler(), RECORD: ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options)
        if job.count > 1 and not read_only:
            _saving.append(self)

    def save(self, step: int, state, data: dict, eval_loss: float | None = None) -> None:
        """Starts to save, and returns once the state is copied or its buffers are held: it may then be donated.

        Args:
            step: finished optimizer steps. Nothing is done where it is already saved.
            state: pytree of global jax.Arrays.
            data: JSON values; what the data pipeline needs to go on.
            eval_loss: nats, where an evaluation was made at this step.

        Raises:
            SaveError: the save before this one failed, and this one was not begun; or this one cannot be. Calling
                again tries again.
            NotFinite: the state is not.
        """
        if step in self.all_steps():
            return
        arrays = tree.named(state)
        record, infinite = Record.of(step, data, eval_loss, {".".join(path): array for path, array in arrays.items()})
        if infinite:
            more = f", and {len(infinite) - 1} more" if len(infinite) > 1 else ""
            raise NotFinite(f"the state after step {step} is not finite: {infinite[0]}{more}")
        items = {
            STATE: ocp.args.PyTreeSave(tree.nested(arrays)),
            RECORD: ocp.args.JsonSave(record.to_json()),
        }
        self._saving, self._losses[step] = step, _or_infinite(eval_loss)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
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
        losses = {step: loss for step in self.all_steps() if (loss := self._loss(step)) < math.inf}
        return min(losses, key=lambda step: (losses[step], -step), default=None)

    def _loss(self, step: int) -> float:
        """The `eval_loss` of a step; infinite where it has none, or is damaged."""
        if step not in self._losses:
            self._losses[step] = math.inf
            with contextlib.suppress(Damaged):
                self._losses[step] = _or_infinite(self._step(step).record.eval_loss)
        return self._losses[step]

    def restore(self, abstract_state, step: int | None = None) -> Restored:
        """The state and the data position saved at `step`; by default the latest that is not damaged.

        Damaged ones are told. All processes of the job take the same.

        Args:
            abstract_state: the state's pytree with a jax.ShapeDtypeStruct with a NamedSharding, of any mesh, as every
                leaf.

        Raises:
            ConfigError: there is no such step, it is damaged, or its leaves have other names, shapes or dtypes.
        """
        return self._restore(abstract_state, step)

    def restore_params(self, abstract_params, step: int | None = None, cast: bool = False) -> Restored:
        """As `restore`, of the state's field `params` alone: nothing else is read. `cast`: into other dtypes too."""
        return self._restore(abstract_params, step, ("params",), cast)

    def _restore(self, abstract, step: int | None, within: tuple[str, ...] = (), cast: bool = False) -> Restored:
        wanted = {(*within, *path): leaf for path, leaf in tree.named(abstract).items()}
        damaged = []
        for number in self._existing(step):
            try:
                arrays, data = self._whole(self._step(number), wanted, within, cast)
            except Damaged as e:
                damaged.append((number, f"checkpoint of step {number} in {self.directory} is damaged: {e}"))
                if step is None:
                    say(f"warning: {damaged[-1][1]}")
                continue
            self._put_aside([number for number, _ in damaged])
            state = tree.like(abstract, {path[len(within) :]: array for path, array in arrays.items()})
            return Restored(state, data, number)
        if step is None:
            raise ConfigError(f"workdir: {self.directory} has no checkpoint that is whole: {damaged[0][1]}")
        raise ConfigError(damaged[0][1])

    def _existing(self, step: int | None) -> list[int]:
        """The steps to try, which are the same in all processes."""
        steps = self.job.agree(self.all_steps())[0]
        if not steps:
            raise ConfigError(f"workdir: no checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise ConfigError(f"step: got {step}; {self.directory} has {', '.join(map(str, steps))}")
        return steps[::-1] if step is None else [step]

    def _step(self, step: int) -> SavedStep:
        return SavedStep(self.directory / str(step))

    def _whole(self, saved: SavedStep, wanted: Shapes, within: tuple[str, ...], cast: bool) -> tuple[Arrays, dict]:
        """The arrays that are wanted, and the data beside them.

        Raises:
            Damaged: they are not as they were saved; in all processes.
        """
        out: Arrays = {}
        for part in self._alike(lambda: saved.parts(wanted, within, cast)):
            # Without it arrays of 64 bits that are to be cast would be read as of 32.
            with jax.enable_x64(jax.config.jax_enable_x64 or any(x.dtype.itemsize == 8 for x in part.values())):
                arrays = self._alike(lambda part=part: saved.read(part))
                saved.compare(arrays)
                while arrays:  # one after the other, which frees what was read
                    path, array = arrays.popitem()
                    out[path] = array.astype(wanted[path].dtype)
        if not saved.record.state:
            say(f"checkpoint of step {saved.step} is of a version without fingerprints: damage would not be noticed")
        return out, saved.record.data

    def _alike(self, part: Callable):
        """What `part` returns, if it is whole in all processes of the job.

        Raises:
            Damaged: in one it is not.
        """
        found, error = None, None
        try:
            found = part()
        except Damaged as e:
            error = str(e)
        for member, other in zip(self.job.members, self.job.agree(error), strict=True):
            if other is not None:
                raise Damaged(other if self.job.count == 1 else f"{other} ({member})")
        return found

    def _put_aside(self, steps: list[int]) -> None:
        """Makes room for these steps, where the run is to save them again."""
        if not self._saves:
            return
        if self.job.first:
            for step in steps:
                aside = self.directory / DAMAGED / f"{step}-{uuid.uuid4().hex[:8]}"
                aside.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(aside)
                say(f"warning: it now lies in {aside}; the run saves another one of step {step} when it comes there")
        if steps:
            self.job.agree(None)
            self._manager.reload()

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
        return f"checkpoint of step {step} was not saved in {self.directory}: {one_line(error)}"

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


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """The two latest steps, and the one of the lowest loss; Orbax's own would keep the losses in files of its own."""

    def __init__(self, loss: Callable[[int], float]):
        self._loss = loss

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = min(steps, key=lambda step: (self._loss(step), -step), default=None)
        kept = {*steps[-2:], *([best] if best is not None and self._loss(best) < math.inf else [])}
        return [step in kept for step in steps]


def _or_infinite(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf
