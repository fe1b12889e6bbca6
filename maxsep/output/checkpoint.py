"""Checkpoints of a run: the training state and the data position, saved as one, restored onto any mesh.

Orbax writes in the background and commits a step by renaming its finished folder, so a step is there whole or not at
all. What a step has to be is kept beside it (record.py) and checked when it is read (saved_step.py): a damaged one is
told, and the one before it is taken.
"""

import math
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from maxsep.cluster.job import ALONE, End, Job
from maxsep.config import ConfigError, cli
from maxsep.output import orbax_errors, tree
from maxsep.output.console import say
from maxsep.output.record import RECORD, STATE, Damaged, Record, RecordHandler, RecordSave
from maxsep.output.retention import Kept, Losses
from maxsep.output.saved_step import FILE_BYTES, SavedStep, array_handler, one_line

DAMAGED = "damaged"  # where a run that goes on from an older step puts those that it could not
TRASH = "trash"  # retention renames a step into it, so that a kill never leaves a step half deleted
WRITE_RATE = 10e6  # bytes per second that a process writes at the least: a slower save counts as stuck
LEAST_SECONDS = 1200  # in which Orbax counts no save as stuck: its own default
ALIKE_SECONDS = 10.0  # in which a save that failed in one process is found to have failed in the others


class SaveError(RuntimeError):
    """A save failed; the checkpoints before it are whole. The message is one line."""


def save_seconds(count: int, job: Job) -> float:
    """Seconds that a save of `count` bytes may take: their share of each process at `WRITE_RATE`, or the watchdog's."""
    return max(job.watchdog, count / job.count / WRITE_RATE)


class NotFinite(RuntimeError):
    """A state with entries that are not finite, which is never saved. The message is one line."""


class Restored(NamedTuple):
    """What was read of a step."""

    state: Any  # pytree of jax.Arrays with the bits that were saved, sharded as asked; they may be donated
    data: dict  # JSON values that were saved beside it
    step: int


class Checkpoints:
    """The checkpoints in one folder: the two latest and the one of the lowest held-out loss.

    Args:
        directory: absolute path; made where it is missing, unless `read_only`.
        read_only: only for restoring: makes, removes and tidies nothing.
        job: this process and the others. Where a save fails in one and the others wait for it, the job ends.
        seconds: that a save may take.
    """

    def __init__(self, directory: Path, read_only: bool = False, job: Job = ALONE, seconds: float = 0.0):
        self.directory, self.job, self.seconds = Path(directory), job, seconds
        self._saving: int | None = None
        self._damaged: set[int] = set()  # steps that were tried
        self._writes = not read_only and jax.process_index() == 0
        self._sweep()
        self._losses = Losses(self.directory, self._writes)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=Kept(self._losses),
            todelete_subdir=TRASH,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            async_options=ocp.AsyncOptions(
                timeout_secs=max(LEAST_SECONDS, int(2 * seconds)),  # the job's watchdog, which names names, is first
                post_finalization_callback=self._sweep,
                create_directories_asynchronously=False,  # else threads wait for minutes for one that cannot be made
            ),
        )
        handlers = {STATE: array_handler(), RECORD: RecordHandler()}
        self._manager = ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options)
        if job.count > 1 and not read_only:
            orbax_errors.heard_by.append(self.on_error)

    def save(self, step: int, state, data: dict) -> None:
        """Starts to save, and returns once the state is copied or its buffers are held: it may then be donated.

        Args:
            step: finished optimizer steps. Nothing is done where it is already saved.
            state: pytree of global jax.Arrays.
            data: JSON values; what the data pipeline needs to go on.

        Raises:
            SaveError: the save before this one failed, and this one was not begun; or this one cannot be. Calling
                again tries again.
            NotFinite: the state is not.
        """
        if step in self.all_steps():
            return
        arrays = tree.named(state)
        record, infinite = Record.of(step, data, {".".join(path): array for path, array in arrays.items()})
        if infinite:
            more = f", and {len(infinite) - 1} more" if len(infinite) > 1 else ""
            raise NotFinite(f"the state after step {step} is not finite: {infinite[0]}{more}")
        items = {
            STATE: ocp.args.PyTreeSave(tree.nested(arrays), ocdbt_target_data_file_size=FILE_BYTES),
            RECORD: RecordSave.of(record),
        }
        self._saving = step
        try:
            self._directory_again()
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as e:
            raise self._failed(e) from e

    def _directory_again(self) -> None:
        """Makes the folder anew where it has gone; Orbax would make the run's own too, where a disk is not mounted.

        Raises:
            OSError: the run's folder is not there.
        """
        if self.directory.is_dir():
            return
        if self._writes:
            self.directory.mkdir(exist_ok=True)
        self._manager.reload()

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
        self._losses.write()

    def evaluated(self, step: int, loss: float | None) -> None:
        """Keeps the held-out loss of a step, in nats, if it is saved or being saved; None: it is not finite."""
        self._losses.put(step, loss)
        if self._saving is None:
            self._losses.write()

    def close(self) -> None:
        """Waits for the save under way, and ends the background threads.

        Raises:
            SaveError: the save failed.
        """
        try:
            self.wait()
        finally:
            if self.on_error in orbax_errors.heard_by:
                orbax_errors.heard_by.remove(self.on_error)
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

    def best_step(self) -> int | None:
        """The step of the lowest held-out loss among those that have one. Waits for the save under way.

        Raises:
            ConfigError: a loss cannot be read.
        """
        losses = {step: loss for step in self.all_steps() if (loss := self._losses.of(step)) < math.inf}
        return min(losses, key=lambda step: (losses[step], -step), default=None)

    @property
    def saving(self) -> bool:
        """Whether a save was begun that `wait` has not been called for."""
        return self._saving is not None

    @property
    def ended(self) -> bool:
        """Whether a save has ended, well or not, that `wait` has not been called for."""
        return self._saving is not None and not self._manager.is_saving_in_progress()

    def steps_up_to(self, step: int) -> list[int]:
        """The saved steps that are not later. Waits for the save under way."""
        return [number for number in self.job.agree(self.all_steps())[0] if number <= step]

    def restore(self, abstract_state, step: int | None = None, up_to: int | None = None) -> Restored:
        """The state and the data position saved at `step`; by default the latest that is not damaged.

        Damaged ones are told, and all processes of the job take the same. With `up_to` later ones than that step are
        not taken.

        Args:
            abstract_state: the state's pytree with a jax.ShapeDtypeStruct with a NamedSharding, of any mesh, as every
                leaf.

        Raises:
            ConfigError: there is no such step, it is damaged, or its leaves have other names, shapes or dtypes.
        """
        return self._restore(abstract_state, step, up_to=up_to)

    def restore_model(self, abstract: dict[str, dict], step: int | None = None, cast: bool = False) -> Restored:
        """As `restore`, of the state's fields `params` and `buffers` alone: nothing else is read.

        `abstract` has both; `cast`: into other dtypes too.
        """
        return self._restore(abstract, step, ("params", "buffers"), cast)

    def _restore(
        self,
        abstract,
        step: int | None,
        fields: tuple[str, ...] = (),
        cast: bool = False,
        up_to: int | None = None,
    ) -> Restored:
        wanted = tree.named(abstract)
        damaged = []
        for number in self._existing(step):
            if up_to is not None and number > up_to:
                continue
            try:
                arrays, data = self._step(number).whole(wanted, fields, cast)
            except Damaged as e:
                damaged.append(f"{self._step(number)} is damaged: {e}")
                self._damaged.add(number)
                if step is None:
                    say(f"warning: {damaged[-1]}")
                continue
            return Restored(tree.like(abstract, arrays), data, number)
        if step is None:
            raise ConfigError(f"workdir: {self.directory} has no checkpoint that is whole: {damaged[0]}")
        raise ConfigError(damaged[0])

    def _existing(self, step: int | None) -> list[int]:
        """The steps to try, which are the same in all processes."""
        steps = self.job.agree(self.all_steps())[0]
        if not steps:
            raise ConfigError(f"workdir: no checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise ConfigError(f"step: got {step}; {self.directory} has {', '.join(map(str, steps))}")
        return steps[::-1] if step is None else [step]

    def _step(self, step: int) -> SavedStep:
        return SavedStep(self.directory / str(step), self.job)

    def go_on_from(self, step: int) -> None:
        """Makes room for the steps that are later than `step`, as they will be saved again.

        Those that were found damaged are put aside. All processes of the job call this.
        """
        later = [number for number in self._manager.all_steps() if number > step]
        if not later:
            return
        if self.job.first:
            for number in later:
                where = DAMAGED if number in self._damaged else TRASH
                aside = self.directory / where / f"{number}-{uuid.uuid4().hex[:8]}"
                aside.parent.mkdir(exist_ok=True)
                (self.directory / str(number)).rename(aside)
                if number in self._damaged:
                    say(f"warning: moved to {aside}; the run saves it again at step {number}")
        self.job.agree(None)
        self._losses.forget_after(step)
        self._manager.reload()
        self._sweep()

    def on_error(self, error: BaseException) -> None:
        """What Orbax says of an error, from any thread: if the save has not ended a while later, it hangs."""
        step = self._saving
        if step is not None:
            timer = threading.Timer(ALIKE_SECONDS, self._end_if_hanging, (step, self._not_saved(step, error)))
            timer.daemon = True
            timer.start()

    def _end_if_hanging(self, step: int, line: str) -> None:
        if self._saving == step and self._manager.is_saving_in_progress():
            self.job.fail(End(cli.SAVE_FAILED, f"{line}; the same command resumes from the checkpoint before it"))

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
