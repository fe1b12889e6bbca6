"""Training: a new or restored state, the loop over steps, and what a run leaves behind."""

import json
import math
import shlex
import statistics
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import jax

from maxsep import cli, console, metrics, prepare, workdir
from maxsep.checkpoint import Checkpoints, SaveError
from maxsep.config import Config, ConfigError
from maxsep.data.feed import to_mesh
from maxsep.data.records import Corpus
from maxsep.mesh import make_mesh
from maxsep.metrics import MetricsWriter
from maxsep.run import Run, init_checkpoints
from maxsep.signals import Stop
from maxsep.step import TrainState


def train(config: Config, folder: Path) -> None:
    """Trains to `train.steps`, from the start or from the run's latest checkpoint.

    Raises:
        ConfigError: what the user asked for cannot be; nothing was written.
        cli.Exit: stopped by a signal, halted on non-finite values, or the last save failed.
    """
    started = time.monotonic()
    resuming, saved = (folder / "config.json").exists(), Checkpoints.exist(folder / "checkpoints")
    config = workdir.check_resume(folder, config) if resuming else workdir.resolve(config)
    if not saved:
        init_checkpoints(config)  # before the data, which may take a while
    corpus = prepare.ensure(config, _say)
    if resuming:
        workdir.check_resume(folder, config, corpus.fingerprint)
    mesh = make_mesh(config)
    peak = metrics.machine_peak(list(mesh.devices.flat), config.model.dtype)
    with jax.set_mesh(mesh), ExitStack() as stack:
        run = Run(config, corpus.tokenizer.end_of_text)
        _say(console.table(f"maxsep: {config.name}", run.described() | {"corpus": corpus.description}))
        state = None if saved else run.new_state()  # may refuse train.init_from: before anything is written
        position = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints"))
            if saved:
                state, data = checkpoints.restore(run.abstract_state)
                position = data["position"]
            step = int(state.step)
            if step >= config.train.steps:
                _check_finished(folder, step, config)
            workdir.write_config(folder, config, corpus.fingerprint)
        except OSError as e:
            raise ConfigError(f"--workdir: cannot write to {folder}: {e.strerror}") from e
        writer = stack.enter_context(MetricsWriter(folder, step))
        if step >= config.train.steps:
            _say(f"this run has finished its {step} steps; with more --config.train.steps it goes on")
        else:
            if saved:
                _say(f"going on from step {step} in {folder}")
            Loop(run, corpus, folder, checkpoints, writer, peak).run(state, position)
    finish(run, corpus, folder, None if step >= config.train.steps else time.monotonic() - started)


def _check_finished(folder: Path, step: int, config: Config) -> None:
    """Refuses to end a run at a step where it was only stopped: it has no result there."""
    if {"train", "eval"} - _logged(folder, step):
        got = f"got {config.train.steps}, but the run in {folder} was stopped after step {step}"
        raise ConfigError(f"train.steps: {got}; takes at least {step + 1}")


def _logged(folder: Path, step: int) -> set[str]:
    """The splits that have a row of this step."""
    path = folder / "metrics.jsonl"
    rows = metrics.read_rows(path) if path.exists() else []
    return {row["split"] for row in rows if row["step"] == step}


def evaluate(config: Config, folder: Path) -> None:
    """Prints the held-out loss of the run's latest checkpoint; changes nothing."""
    config = workdir.check_resume(folder, config)
    if not Checkpoints.exist(folder / "checkpoints"):
        raise ConfigError(f"--workdir: got {folder}, which has no checkpoint; takes the folder of a run that saved one")
    corpus = prepare.ensure(config, _say)
    workdir.check_resume(folder, config, corpus.fingerprint)
    with jax.set_mesh(make_mesh(config)), Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        run, step = Run(config, corpus.tokenizer.end_of_text), checkpoints.latest_step()
        _say(console.table(f"maxsep: {config.name}", run.described() | {"corpus": corpus.description}))
        scores = run.evaluate(checkpoints.restore_params(run.abstract_state.params), corpus)
    _say(console.table(f"step {step}", _held_out(scores["loss"], corpus)))


def finish(run: Run, corpus: Corpus, folder: Path, seconds: float | None) -> None:
    """Writes `summary.json` from the run's rows, and prints it.

    `seconds` is what this start of the run took; None: it found all steps done, and a summary stays as it is.
    """
    path = folder / "summary.json"
    summary = summarise(run, corpus, folder, seconds)
    before = json.loads(path.read_text(encoding="utf-8")) if seconds is None and path.exists() else {}
    if before.get("steps") == summary["steps"]:
        summary = before
    else:  # there is none, or it is of fewer steps: the run was killed before it wrote that of these
        workdir.write_json(path, summary)
    mfu = "unknown, the device's peak is not known" if summary["mfu"] is None else f"{summary['mfu']:.1%}"
    tokens, seconds = _number(summary["tokens_per_second"]), _number(summary["step_seconds"])
    _say(
        console.table(
            f"result after step {summary['steps']}",
            {
                **_held_out(_number(summary["eval_loss"]), corpus),
                "train loss": f"{_number(summary['train_loss']):.4f} nats/token",
                "speed": f"{tokens:,.0f} tokens/s, {seconds:.3f} s a step, MFU {mfu}",
                "time": f"{_number(summary['seconds']):.0f} s",
                "written": f"{folder}: checkpoints/, metrics.jsonl, summary.json, tensorboard/",
            },
        )
    )
    flag = "--config.train.steps="
    again = [argument for argument in sys.argv if not argument.startswith(flag)]
    _say("train on: " + shlex.join(["python", *again, f"{flag}{2 * summary['steps']}"]))


def summarise(run: Run, corpus: Corpus, folder: Path, seconds: float | None) -> dict:
    """What `summary.json` holds: docs/metrics.md."""
    rows = metrics.read_rows(folder / "metrics.jsonl")
    trained = [row for row in rows if row["split"] == "train"]
    held_out = [row for row in rows if row["split"] == "eval"]

    def median(name: str) -> float | None:
        values = [row[name] for row in trained if row[name] is not None]
        return statistics.median(values) if values else None

    config = run.config
    return {
        "steps": trained[-1]["step"],
        "parameters": config.model.parameters,
        "train_loss": trained[-1]["loss"],
        "eval_loss": held_out[-1]["loss"],
        "eval_perplexity": held_out[-1]["perplexity"],
        "eval_tokens": corpus.eval.targets,
        "unigram_entropy": corpus.unigram_entropy,
        **{name: median(name) for name in ("tokens_per_second", "step_seconds", "mfu")},
        "seconds": seconds,
        "skipped_steps": trained[-1]["skipped_steps"],
        "layout": config.layout,
        "mesh": {axis: getattr(config.mesh, axis) for axis in ("stage", "attention", "expert")},
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # JSON has no word for what is not finite


def _held_out(loss: float, corpus: Corpus) -> dict[str, str]:
    gain = corpus.unigram_entropy - loss
    return {
        "held-out loss": f"{loss:.4f} nats/token (perplexity {metrics.perplexity(loss):,.1f}) "
        f"over {corpus.eval.targets:,} tokens",
        "unigram": f"{corpus.unigram_entropy:.4f} nats/token on the same tokens: the model is {gain:.2f} better",
    }


class Loop:
    """The steps of a run. A step's metrics are fetched while the next one computes."""

    def __init__(
        self,
        run: Run,
        corpus: Corpus,
        folder: Path,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        peak: float | None,
    ):
        self.train, self.corpus, self.folder, self.peak = run.config.train, corpus, folder, peak
        self.program, self.checkpoints, self.writer = run, checkpoints, writer
        self.pending: tuple[int, dict] | None = None  # a step whose metrics are still on the devices
        self.seconds: list[float] = []  # of each step since the last row
        self.skipped = 0  # non-finite steps in a row, as far as is known
        self.save_failed = False

    def run(self, state: TrainState, position: int) -> None:
        """Trains `state` on the records from `position` on.

        Raises:
            cli.Exit: see `train`.
        """
        train, step = self.train, int(state.step)
        bounds = [int(number) for number in (train.profile or "1:0").split(":")]
        profiled, profiling = range(bounds[0], bounds[1] + 1), False
        with ExitStack() as stack:
            stop = stack.enter_context(Stop())
            self.progress = stack.enter_context(console.Progress(train.steps, step))
            begin = time.monotonic()
            self.progress.print("compiling the train step …")
            train_step = self.program.compile_train_step()
            self.progress.print(f"compiled in {time.monotonic() - begin:.1f} s")
            if step > 0 and _due(train.eval_every, step) and "eval" not in _logged(self.folder, step):
                self.evaluate(state, step)  # a signal had left no time for it
            batches = stack.enter_context(closing(self.program.train_batches(self.corpus, position)))
            self.clock = time.monotonic()
            for batch in to_mesh(batches, self.program.batch_shape, self.program.batch_sharding):
                if step + 1 in profiled and not profiling:
                    jax.profiler.start_trace(self.folder / "profile")
                    profiling = True
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                    state, device_metrics = train_step(state, batch)
                self.take_metrics()
                step, position = step + 1, position + train.batch_size
                self.pending = (step, device_metrics)
                # Kept: the step under way may be finite again.
                nonfinite = self.skipped if self.skipped >= train.nonfinite_limit else 0
                halt = stop.asked is not None or nonfinite > 0
                last = halt or step == train.steps
                evaluate = step == train.steps or (_due(train.eval_every, step) and not halt)
                if profiling and (last or step + 1 not in profiled):
                    self.take_metrics(row=last)
                    jax.profiler.stop_trace()
                    profiling = False
                if evaluate or last or _due(train.checkpoint_every, step):
                    self.take_metrics(row=last)
                    scores = self.evaluate(state, step) if evaluate else None
                    if last or _due(train.checkpoint_every, step):
                        self.save(step, state, {"position": position}, scores)
                    self.clock = time.monotonic()
                if last:
                    break
            self.wait_for_save()
        nonfinite = max(nonfinite, self.skipped if self.skipped >= train.nonfinite_limit else 0)
        if nonfinite:
            raise cli.Exit(
                cli.NONFINITE,
                f"halted after step {step}: loss or gradients were not finite {nonfinite} steps in a row "
                f"(train.nonfinite_limit); the state before them is saved in {self.folder}",
            )
        if self.save_failed:
            raise cli.Exit(cli.SAVE_FAILED, f"the last save failed; see above. {self.folder} has the one before it")
        if stop.asked and step < train.steps:
            raise cli.Exit(
                cli.STOPPED, f"{stop.asked}: stopped after step {step}, saved; the same command goes on from there"
            )

    def take_metrics(self, row: bool = False) -> None:
        """Waits for the pending step and logs it where a row is due, or asked for with `row`."""
        if self.pending is None:
            return
        step, device_metrics = self.pending
        self.pending = None
        self.skipped = int(jax.device_get(device_metrics["skipped"])[1])
        now = time.monotonic()
        self.seconds.append(now - self.clock)
        self.clock = now
        if self.skipped:
            self.progress.print(f"step {step}: loss or gradients are not finite; skipped, {self.skipped} in a row")
        if row or _due(self.train.log_every, step):
            values = self.program.figures(device_metrics, statistics.fmean(self.seconds), self.peak)
            self.seconds.clear()
            self.progress.print(console.line(self.writer.write(step, "train", values), self.train.steps))
        self.progress.step(step)

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        self.progress.print(f"evaluating on {self.corpus.eval.targets:,} held-out tokens …")
        scores = self.program.evaluate(state.params, self.corpus)
        self.progress.print(console.line(self.writer.write(step, "eval", scores), self.train.steps))
        return {"eval_loss": scores["loss"]}

    def save(self, step: int, state: TrainState, data: dict, scores: dict[str, float] | None) -> None:
        """Starts a checkpoint. One that fails is reported and tried again at the next; training goes on."""
        for _ in range(2):  # the first error may be of the save before this one
            try:
                self.checkpoints.save(step, state, data, scores)
                self.save_failed = False
                return
            except SaveError as error:
                self.save_failed = True
                self.progress.print(f"warning: {error}")

    def wait_for_save(self) -> None:
        try:
            self.checkpoints.wait()
        except SaveError as error:
            self.save_failed = True
            self.progress.print(f"warning: {error}")


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _say(text: str) -> None:
    print(text, flush=True)
