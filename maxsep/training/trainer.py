"""Training: a new or restored state, and the loop over steps."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import jax

from maxsep.cluster.job import ALONE, Job
from maxsep.config import Config, ConfigError, cli
from maxsep.data import preparation
from maxsep.data.feed import to_mesh
from maxsep.data.records import Corpus
from maxsep.measure import flops
from maxsep.output import console, metrics, workdir
from maxsep.output.checkpoint import ALIKE_SECONDS, Checkpoints, SaveError
from maxsep.output.metrics import MetricsWriter
from maxsep.parallel.mesh import make_mesh
from maxsep.training import summary
from maxsep.training.run import Run
from maxsep.training.signals import Stop
from maxsep.training.step import TrainState


def train(config: Config, folder: Path, job: Job = ALONE) -> None:
    """Trains to `train.steps`, from the start or from the run's latest checkpoint; in all processes of the job alike.

    Raises:
        ConfigError: what the user asked for cannot be; nothing was written.
        cli.Exit: stopped by a signal, halted on non-finite values, or the last save failed.
    """
    started = time.monotonic()
    saved = workdir.has_checkpoint(folder)
    resuming = saved or (folder / "config.json").exists()
    workdir.check_alike(folder, job, saved, resuming)
    config = workdir.check_resume(folder, config) if resuming else workdir.resolve(config)
    corpus = preparation.ensure(config, console.say, job)
    if resuming:
        workdir.check_resume(folder, config, corpus.fingerprint)
    job.at("starting")
    mesh = make_mesh(config)
    peak = flops.machine_peak(list(mesh.devices.flat), config.model.dtype)
    with jax.set_mesh(mesh), ExitStack() as stack:
        run = Run(config, corpus.tokenizer.end_of_text, corpus.tokenizer.vocab_size)
        console.say(console.table(f"maxsep: {config.name}", run.described() | {"corpus": corpus.description}))
        state = None if saved else run.new_state(job)  # may refuse train.init_from: before anything is written
        position = step = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            workdir.check_shared(folder, job)
            checkpoints = stack.enter_context(Checkpoints(folder / workdir.CHECKPOINTS, job=job))
            if saved:
                state, data, step = checkpoints.restore(run.abstract_state)
                position = data["position"]
            finished = step >= config.train.steps and _check_finished(folder, step, config)
            job.agree(None)  # before the first process writes what all have read
            writer = None
            if job.first:
                workdir.write_config(folder, config, corpus.fingerprint, corpus.tokenizer.fingerprint)
                writer = stack.enter_context(MetricsWriter(folder, step))
        except OSError as e:
            raise ConfigError(f"--workdir: cannot write to {folder}: {e.strerror}") from e
        if finished:
            console.say(f"this run has finished its {step} steps; with more --config.train.steps it goes on")
        else:
            if saved:
                console.say(f"going on from step {step} in {folder}")
                if config.train.profile and int(config.train.profile.partition(":")[2]) <= step:
                    console.say(f"train.profile: steps {config.train.profile} are done; nothing is recorded")
            Loop(run, corpus, folder, checkpoints, writer, peak, job).train(state, position)
    job.at("ending")
    if job.first:
        summary.finish(run, corpus, folder, None if finished else time.monotonic() - started)


def _check_finished(folder: Path, step: int, config: Config) -> bool:
    """Whether a run that is to end at `step`, or before, has its result: a signal may have cut the last evaluation off.

    Raises:
        ConfigError: the run was only stopped there, on its way to more steps.
    """
    missing = {"train", "eval"} - _logged(folder, step)
    if "train" in missing or (missing and step > config.train.steps):
        least = step + ("train" in missing)
        got = f"got {config.train.steps}, but the run in {folder} was stopped after step {step}"
        raise ConfigError(f"train.steps: {got}; takes at least {least}")
    return not missing


def _logged(folder: Path, step: int) -> set[str]:
    """The splits that have a row of this step."""
    path = folder / "metrics.jsonl"
    rows = metrics.read_rows(path) if path.exists() else []
    return {row["split"] for row in rows if row["step"] == step}


def evaluate(config: Config, folder: Path, job: Job = ALONE) -> None:
    """Prints the held-out loss of the run's latest checkpoint; changes nothing."""
    config = workdir.check_resume(folder, config, may_change=workdir.EVALUATION_MAY_CHANGE)
    corpus = preparation.ensure(config, console.say, job)
    workdir.check_resume(folder, config, corpus.fingerprint, workdir.EVALUATION_MAY_CHANGE)
    with jax.set_mesh(make_mesh(config)), Checkpoints(folder / workdir.CHECKPOINTS, True, job) as checkpoints:
        run = Run(config, corpus.tokenizer.end_of_text, corpus.tokenizer.vocab_size)
        console.say(console.table(f"maxsep: {config.name}", run.described() | {"corpus": corpus.description}))
        params, _, step = checkpoints.restore_params(run.abstract_state.params)
        job.at("compiling")
        scores = run.evaluate(params, corpus, lambda: job.at("evaluating"), job.waiting)
    console.say(console.table(f"step {step}", summary.held_out(scores["loss"], corpus)))


class Loop:
    """The steps of a run. A step's metrics are fetched while the next one computes."""

    def __init__(
        self,
        run: Run,
        corpus: Corpus,
        folder: Path,
        checkpoints: Checkpoints,
        writer: MetricsWriter | None,
        peak: float | None,
        job: Job,
    ):
        self.settings, self.corpus, self.folder, self.peak = run.config.train, corpus, folder, peak
        self.run, self.checkpoints, self.writer, self.job = run, checkpoints, writer, job
        self.stop = Stop()
        self.asked: str | None = None  # the signal that some process got, once all know of it
        self.pending: tuple[int, dict] | None = None  # a step whose metrics are still on the devices
        self.seconds: list[float] = []  # of each step since the last row
        self.skipped = 0  # non-finite steps in a row, as far as is known
        self.nonfinite = 0  # as many as halted the run
        self.compiled_eval = False
        self.cut_off = False  # a signal ended the last evaluation
        self.save_failed = False

    def train(self, state: TrainState, position: int) -> None:
        """Trains `state` on the records from `position` on, and evaluates it at the end.

        Raises:
            cli.Exit: see `train`.
        """
        steps, every, step = self.settings.steps, self.settings.eval_every, int(state.step)
        with ExitStack() as stack:
            stack.enter_context(self.stop)
            self.progress = stack.enter_context(console.Progress(steps, step))
            due = step > 0 and (_due(every, step) or step == steps)
            if due and not self.job.agree("eval" in _logged(self.folder, step))[0]:
                self.evaluate(state, step)  # a signal had left no time for it
            if step < steps and not self.stopping():
                step = self.take_steps(state, step, position)
            self.wait_for_save(step)
            self.job.at("ending", step)
        if self.nonfinite:
            raise cli.Exit(
                cli.NONFINITE,
                f"halted after step {step}: loss or gradients were not finite {self.nonfinite} steps in a row "
                f"(train.nonfinite_limit); the state before them is saved in {self.folder}",
            )
        if self.save_failed:
            raise cli.Exit(cli.SAVE_FAILED, f"the last save failed; see above. {self.folder} has the one before it")
        if self.asked and (step < steps or self.cut_off):
            after = f"in the evaluation after step {step}" if self.cut_off else f"after step {step}"
            raise cli.Exit(cli.STOPPED, f"{self.asked}: stopped {after}, saved; the same command goes on from there")

    def stopping(self) -> bool:
        """Whether a signal has asked some process to end the run: all hear of it at the same point of the program."""
        if self.asked is None:
            for member, asked in zip(self.job.members, self.job.agree(self.stop.asked), strict=True):
                if asked is not None:
                    self.asked = f"{asked} in {member}" if self.job.count > 1 else asked
        return self.asked is not None

    def take_steps(self, state: TrainState, step: int, position: int) -> int:
        """Trains until the last step, a signal, or the limit of non-finite steps; returns the step it ended after."""
        settings = self.settings
        first, last_profiled = (int(number) for number in (settings.profile or "1:0").split(":"))
        profiled, profiling = range(first, last_profiled + 1), False
        begin = time.monotonic()
        self.job.at("compiling", step)
        self.progress.print("compiling the train step …")
        train_step = self.run.compile_train_step()
        self.progress.print(f"compiled in {time.monotonic() - begin:.1f} s")
        with closing(self.run.train_batches(self.corpus, position)) as batches:
            self.clock = time.monotonic()
            self.job.at("training", step)
            for batch in to_mesh(batches, self.run.batch_shape, self.run.batch_sharding):
                if step + 1 in profiled and not profiling and self.job.first:
                    jax.profiler.start_trace(self.folder / "profile")
                    profiling = True
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                    state, device_metrics = train_step(state, batch)
                self.take_metrics()
                step, position = step + 1, position + settings.batch_size
                self.pending = (step, device_metrics)
                # Before the step under way is known, which may be finite again.
                halt = self.stopping() or self.nonfinite > 0
                last = halt or step == settings.steps
                evaluate = step == settings.steps or (_due(settings.eval_every, step) and not halt)
                if profiling and (last or step + 1 not in profiled):
                    self.take_metrics(row=last or evaluate)
                    jax.profiler.stop_trace()
                    profiling = False
                    self.clock = time.monotonic()
                if evaluate or last or _due(settings.checkpoint_every, step):
                    self.take_metrics(row=last or evaluate)
                    loss = self.evaluate(state, step) if evaluate else None
                    last = last or self.cut_off
                    if last or _due(settings.checkpoint_every, step):
                        self.save(step, state, {"position": position}, loss)
                    self.job.at("training", step)
                    self.clock = time.monotonic()
                if last:
                    break
        return step

    def take_metrics(self, row: bool = False) -> None:
        """Waits for the pending step and logs it where a row is due, or asked for with `row`."""
        if self.pending is None:
            return
        step, device_metrics = self.pending
        self.pending = None
        with self.job.waiting():
            self.skipped = int(jax.device_get(device_metrics["skipped"])[1])
        self.job.at("training", step)
        now = time.monotonic()
        self.seconds.append(now - self.clock)
        self.clock = now
        if self.skipped >= self.settings.nonfinite_limit:
            self.nonfinite = self.skipped
        if self.skipped:
            self.progress.print(f"step {step}: loss or gradients are not finite; skipped, {self.skipped} in a row")
        if row or _due(self.settings.log_every, step):
            seconds, last = statistics.fmean(self.seconds), step == self.settings.steps
            values = self.run.figures(device_metrics, seconds, self.peak, shares=last)
            self.seconds.clear()
            self.log(step, "train", values)
        self.progress.step(step)

    def evaluate(self, state: TrainState, step: int) -> float | None:
        """The held-out loss, which a checkpoint keeps; None where a signal cut the evaluation off."""
        self.progress.print(f"evaluating on {self.corpus.eval.targets:,} held-out tokens …")
        self.job.at("evaluating" if self.compiled_eval else "compiling", step)

        def after_batch() -> bool:
            self.job.at("evaluating", step)
            return self.stopping()

        scores = self.run.evaluate(state.params, self.corpus, after_batch, self.job.waiting)
        self.compiled_eval, self.cut_off = True, scores is None
        if scores is None:
            return None
        self.log(step, "eval", scores)
        return scores["loss"]

    def log(self, step: int, split: str, values: dict) -> None:
        if self.writer is None:  # the first process does it
            return
        try:
            row = self.writer.write(step, split, values)
        except OSError as e:
            raise cli.Exit(
                cli.SAVE_FAILED,
                f"cannot write metrics.jsonl in {self.folder}: {e.strerror}; "
                "with room for it the same command goes on from the latest checkpoint",
            ) from e
        self.progress.print(console.line(row, self.settings.steps))

    def save(self, step: int, state: TrainState, data: dict, eval_loss: float | None) -> None:
        """Starts a checkpoint. One that fails is reported and tried again at the next; training goes on."""
        self.wait_for_save(step)
        self.save_failed = not self.tried(lambda: self.checkpoints.save(step, state, data, eval_loss))

    def wait_for_save(self, step: int) -> None:
        """Returns when the last checkpoint is on disk."""
        self.job.at("saving", step)
        if not self.tried(self.checkpoints.wait):
            self.save_failed = True

    def tried(self, part: Callable[[], None]) -> bool:
        """Whether this part of a save succeeded, in all processes alike.

        Raises:
            cli.Exit: in some it did, in some not: Orbax's processes no longer wait for each other at the same places.
        """
        error = None
        try:
            with self.job.waiting():
                part()
        except SaveError as e:
            error = str(e)
            self.progress.print(f"warning: {error}")
        errors = self.job.agree(error, None if error is None else ALIKE_SECONDS)
        failed = [f"{e} ({member})" for e, member in zip(errors, self.job.members, strict=True) if e is not None]
        if 0 < len(failed) < len(errors):
            raise cli.Exit(cli.SAVE_FAILED, f"{failed[0]}; the same command goes on from the checkpoint before it")
        return not failed


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
