"""The steps of a run: training, evaluating and saving, until the last step, a signal, or a state that is lost."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import jax

from maxsep.cluster.job import Job
from maxsep.cluster.signals import Stop
from maxsep.config import cli
from maxsep.data.feed import to_mesh
from maxsep.data.mixture import Mixture
from maxsep.output import console
from maxsep.output.checkpoint import ALIKE_SECONDS, Checkpoints, NotFinite, SaveError
from maxsep.output.metrics import MetricsWriter
from maxsep.training.run import Run
from maxsep.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0  # finished optimizer steps
    records: int = 0  # that were taken from the corpus
    rollbacks: int = 0

    @classmethod
    def saved(cls, step: int, data: dict) -> "Position":
        """That which a checkpoint has."""
        return cls(step, data["position"], data.get("rollbacks", 0))

    def to_json(self) -> dict:
        return {"position": self.records, "rollbacks": self.rollbacks}


class Loop:
    """The steps of a run. A step's metrics are fetched while the next one computes.

    Args:
        writer: in the first process of the job; it writes for all.
        write_config: writes the run's `config.json`: where its folder has gone and come back without, and when the
            first step is saved, so that a later start knows it if the checkpoints are gone.
        saved: a step has been saved.
    """

    def __init__(
        self,
        run: Run,
        corpus: Mixture,
        folder: Path,
        checkpoints: Checkpoints,
        writer: MetricsWriter | None,
        write_config: Callable[..., None],
        saved: bool,
        peak: float | None,
        job: Job,
    ):
        self.settings, self.corpus, self.folder, self.peak = run.config.train, corpus, folder, peak
        self.run, self.checkpoints, self.writer, self.job = run, checkpoints, writer, job
        self.write_config, self.saved, self.saved_written = write_config, saved, saved
        self.stop = Stop()
        self.asked: str | None = None  # the signal that some process got, once all know of it
        self.pending: tuple[Position, dict] | None = None  # after a step whose metrics are still on the devices
        self.seconds: list[float] = []  # of each step since the last row
        self.skipped = 0  # non-finite steps in a row, as far as is known
        self.not_finite: str | None = None  # what was found of the state, when it was to be saved
        self.compiled_eval = False
        self.cut_off = False  # a signal ended the last evaluation
        self.rollbacks = 0  # of the run
        self.saved_everywhere = False  # the save under way has ended in all processes
        self.save_error: Exception | None = None  # of the last save
        self.rows_error: OSError | None = None  # of rows that wait to be written

    def train(self, state: TrainState, at: Position, evaluated: bool) -> None:
        """Trains `state` from `at` on, and evaluates it at the end; `evaluated`: what is due there has been done.

        Raises:
            cli.Exit: stopped by a signal, halted on non-finite values, or the last save failed.
        """
        steps, every = self.settings.steps, self.settings.eval_every
        with ExitStack() as stack:
            stack.enter_context(self.stop)
            self.progress = stack.enter_context(console.Progress(steps, at.step))
            due = at.step > 0 and (_due(every, at.step) or at.step == steps)
            if due and not evaluated:
                self.evaluate(state, at.step)  # a signal had left no time for it
            if at.step < steps and not self.stopping():
                at = self.train_on(state, at)
            self.wait_for_save(at.step)
            self.write_rows()
            self.job.at("ending", at.step)
        error = self.rows_error or self.save_error
        if self.asked and (at.step < steps or self.cut_off) and not error:
            after = f"in the evaluation after step {at.step}" if self.cut_off else f"after step {at.step}"
            raise cli.Exit(cli.STOPPED, f"{self.asked}: stopped {after}, saved; the same command resumes from there")
        if error:
            what = f"the last save failed; see above. {self.folder} has the one before it"
            raise cli.Exit(cli.SAVE_FAILED, what) from error

    def train_on(self, state: TrainState, at: Position) -> Position:
        """Trains, with what rollbacks it may take; how far it has come.

        Raises:
            cli.Exit: halted.
        """
        self.job.at("compiling", at.step)
        begin = time.monotonic()
        self.progress.print("compiling the train step …")
        train_step = self.run.compile_train_step()
        self.progress.print(f"compiled in {time.monotonic() - begin:.1f} s")
        if int(jax.device_get(state.skipped)[1]) >= self.settings.nonfinite_limit:  # it halted there
            state = dataclasses.replace(state, skipped=jax.jit(lambda skipped: skipped.at[1].set(0))(state.skipped))
        while True:
            self.rollbacks = at.rollbacks
            state, at = self.take_steps(train_step, state, at)
            if not self.lost:
                return at
            what = self.not_finite or (
                f"loss or gradients were not finite {self.skipped} steps in a row (train.nonfinite_limit)"
            )
            good = at.step - max(self.skipped, 1)
            if at.rollbacks >= self.settings.rollbacks or not self.checkpoints.steps_up_to(good):
                break
            del state  # makes room for the one that is read
            state, at = self.roll_back(at, good, what)
        if self.not_finite is None:
            self.save(state, at)
            self.wait_for_save(at.step)
        kept = "the state before them" if self.not_finite is None else "the one before it"
        back = f", after {at.rollbacks} of {self.settings.rollbacks} rollbacks (train.rollbacks)"
        raise cli.Exit(cli.NONFINITE, f"halted after step {at.step}: {what}{back}; {kept} is saved in {self.folder}")

    @property
    def lost(self) -> bool:
        """Whether nothing good comes of going on from the state there is."""
        return self.skipped >= self.settings.nonfinite_limit or self.not_finite is not None

    def roll_back(self, at: Position, good: int, what: str) -> tuple[TrainState, Position]:
        """The latest checkpoint up to the step `good`, to go on from with the data that comes next."""
        self.wait_for_save(at.step)
        self.pending, self.skipped, self.not_finite = None, 0, None
        state, _, step = self.checkpoints.restore(self.run.abstract_state, up_to=good)
        self.checkpoints.go_on_from(step)
        self.progress.print(
            f"{what}; rolled back to step {step}, and skips the data of steps {step + 1} to {at.step} from now on"
        )
        self.seconds.clear()
        if self.writer is not None:
            try:
                self.writer.rewind(step)
            except OSError as e:
                raise cli.Exit(cli.SAVE_FAILED, f"cannot write metrics.jsonl in {self.folder}: {e.strerror}") from e
        return state, Position(step, at.records, at.rollbacks + 1)

    def stopping(self) -> bool:
        """Whether a signal has asked some process to end the run: all hear of it at the same point of the program."""
        asked = self.stop.asked or ("SIGPIPE" if console.unread() else None)
        asked, index, self.saved_everywhere = self.job.agree([asked, self.checkpoints.ended], reduced=_heard)
        if asked is not None and self.asked is None:
            self.asked = f"{asked} in {self.job.members[index]}" if self.job.count > 1 else asked
        return self.asked is not None

    def take_steps(self, train_step, state: TrainState, at: Position) -> tuple[TrainState, Position]:
        """Trains until the last step, a signal, or until the state is `lost`."""
        settings = self.settings
        first, last_profiled = (int(number) for number in (settings.profile or "1:0").split(":"))
        profiled, profiling = range(first, last_profiled + 1), False
        with closing(self.run.train_batches(self.corpus, at.records)) as batches:
            self.clock = time.monotonic()
            self.job.at("training", at.step)
            for batch in to_mesh(batches, self.run.batch_shape, self.run.batch_sharding):
                if at.step + 1 in profiled and not profiling and self.job.first:
                    jax.profiler.start_trace(self.folder / "profile")
                    profiling = True
                with jax.profiler.StepTraceAnnotation("train", step_num=at.step + 1):
                    state, device_metrics = train_step(state, batch)
                self.take_metrics()
                if self.lost:  # then the step that was just begun changes nothing: step.py
                    break
                step = at.step + 1
                at = dataclasses.replace(at, step=step, records=at.records + settings.batch_size)
                self.pending = (at, device_metrics)
                stopping = self.stopping()
                last = stopping or step == settings.steps
                evaluate = step == settings.steps or (_due(settings.eval_every, step) and not stopping)
                if profiling and (last or step + 1 not in profiled):
                    self.take_metrics(row=last or evaluate)
                    jax.profiler.stop_trace()
                    profiling = False
                    self.clock = time.monotonic()
                if self.saved_everywhere:
                    self.wait_for_save(step)
                self.check_folder()
                if evaluate or last or _due(settings.checkpoint_every, step):
                    self.take_metrics(row=last or evaluate)
                    if self.lost:
                        break
                    saved = last or _due(settings.checkpoint_every, step)
                    if saved:  # before the evaluation, a fault in which then costs nothing
                        self.save(state, at)
                    if evaluate and not self.lost:
                        self.evaluate(state, step)
                    if self.cut_off and not saved:
                        self.save(state, at)
                    last = last or self.cut_off
                    self.job.at("training", step)
                    self.clock = time.monotonic()
                if last or self.lost:
                    break
        if profiling:
            jax.profiler.stop_trace()
        return state, at

    def take_metrics(self, row: bool = False) -> None:
        """Waits for the pending step and logs it where a row is due, or asked for with `row`."""
        if self.pending is None:
            return
        at, device_metrics = self.pending
        self.pending, step = None, at.step
        with self.job.waiting():
            self.skipped = int(jax.device_get(device_metrics["skipped"])[1])
        self.job.at("training", step)
        now = time.monotonic()
        self.seconds.append(now - self.clock)
        self.clock = now
        if self.skipped:
            self.progress.print(f"step {step}: loss or gradients are not finite; skipped, {self.skipped} in a row")
        if row or self.lost or _due(self.settings.log_every, step):
            seconds, last = statistics.fmean(self.seconds), step == self.settings.steps
            values = self.run.figures(device_metrics, seconds, self.peak, shares=last)
            values["rollbacks"] = self.rollbacks
            values["epochs"] = self.corpus.epochs(at.records)
            self.seconds.clear()
            self.log(step, "train", values)
        self.progress.step(step)

    def evaluate(self, state: TrainState, step: int) -> None:
        """Logs the held-out loss, which the step's checkpoint keeps too, unless a signal cuts the evaluation off."""
        if not self.compiled_eval:  # which needs memory of its own: a save under way is brought home first
            self.wait_for_save(step)
        self.progress.print(f"evaluating on {self.corpus.held_out:,} held-out tokens …")
        self.job.at("evaluating" if self.compiled_eval else "compiling", step)

        def after_batch() -> bool:
            self.job.at("evaluating", step)
            return self.stopping()

        scores = self.run.evaluate(state.variables, self.corpus, after_batch, self.job.waiting)
        self.compiled_eval, self.cut_off = True, scores is None
        if scores is not None:
            self.log(step, "eval", scores)
            self.checkpoints.evaluated(step, scores["loss"])

    def log(self, step: int, split: str, values: dict) -> None:
        if self.writer is None:  # the first process does it
            return
        row = self.writer.write(step, split, values)
        self.progress.print(console.line(row, self.settings.steps))
        self.write_rows()

    def write_rows(self) -> str | None:
        """Has the rows written that wait for it. Why that fails, which is told once."""
        if self.writer is None:
            return None
        try:
            stale = self.saved_written != self.saved or not (self.folder / "config.json").exists()
            if self.folder.is_dir() and stale:
                self.write_config(saved=self.saved)
                self.saved_written = self.saved
                (self.folder / "tensorboard").mkdir(exist_ok=True)
            self.writer.flush()
        except OSError as e:
            why = f"metrics.jsonl cannot be written in {self.folder}: {e.strerror}"
            if not self.rows_error:
                self.progress.print(f"warning: {why}; its rows are kept until it can")
            self.rows_error = e
            return why
        if self.rows_error:
            self.progress.print("metrics.jsonl is written again")
        self.rows_error = None
        return None

    def check_folder(self) -> None:
        """Tells in the step in which it happens that the run's folder has gone, and when it is there again."""
        if self.writer is not None and (self.rows_error or not (self.folder / "metrics.jsonl").exists()):
            self.write_rows()

    def save(self, state: TrainState, at: Position) -> None:
        """Starts a checkpoint. One that fails is reported and tried again at the next; training goes on."""
        self.wait_for_save(at.step)
        unwritten = self.job.agree(self.write_rows())[0]
        if unwritten:  # a checkpoint's rows are on disk before it
            self.progress.print(f"warning: checkpoint of step {at.step} was not saved: {unwritten}")
            self.save_error = self.rows_error or SaveError(unwritten)
            return
        self.job.at("saving", at.step, self.checkpoints.seconds)
        try:
            self.save_error = self.tried(lambda: self.checkpoints.save(at.step, state, at.to_json()))
        except NotFinite as e:  # in all processes
            self.not_finite = str(e)
        self.job.at("training", at.step)

    def wait_for_save(self, step: int) -> None:
        """Returns when the last checkpoint is on disk."""
        self.job.at("saving", step, self.checkpoints.seconds)
        saving = self.checkpoints.saving
        error = self.tried(self.checkpoints.wait)
        if saving and not error and not self.saved:
            self.saved = True
            self.write_rows()
        self.save_error = error or self.save_error
        self.job.at("training", step)

    def tried(self, part: Callable[[], None]) -> SaveError | None:
        """What made this part of a save fail, in all processes alike.

        Raises:
            cli.Exit: in some it did, in some not: Orbax's processes no longer wait for each other at the same places.
        """
        error = None
        try:
            with self.job.waiting():
                part()
        except SaveError as e:
            error = e
            self.progress.print(f"warning: {e}")
        seconds = None if error is None else ALIKE_SECONDS
        failed, index, first = self.job.agree(error and str(error), seconds, reduced=_failed)
        if 0 < failed < self.job.count:
            what = f"{first} ({self.job.members[index]}); the same command resumes from the checkpoint before it"
            raise cli.Exit(cli.SAVE_FAILED, what) from error
        return error


def _heard(said: list) -> list:
    """The first signal that some process has got, the process's number, and whether a save has ended in all."""
    signals = [(asked, index) for index, (asked, _) in enumerate(said) if asked is not None]
    return [*(signals or [(None, None)])[0], all(ended for _, ended in said)]


def _failed(errors: list) -> list:
    """In how many processes a save has failed, the number of the first of them, and why."""
    failed = [(index, error) for index, error in enumerate(errors) if error is not None]
    return [len(failed), *(failed or [(None, None)])[0]]


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
