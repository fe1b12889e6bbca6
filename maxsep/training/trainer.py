"""Training: a new or restored state, and what is around its steps."""

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax

from maxsep.cluster.job import ALONE, Job
from maxsep.config import Config, ConfigError
from maxsep.data import preparation
from maxsep.measure import flops
from maxsep.output import console, metrics, workdir
from maxsep.output.checkpoint import Checkpoints, save_seconds
from maxsep.output.lock import Lock
from maxsep.output.metrics import MetricsWriter
from maxsep.parallel.mesh import make_mesh
from maxsep.training import optimizer, summary
from maxsep.training.loop import Loop, Position
from maxsep.training.run import Run


def train(config: Config, folder: Path, lock: Lock, job: Job = ALONE, plan: dict | None = None) -> None:
    """Trains to `train.steps`, from the start or from the run's latest checkpoint; in all processes of the job alike.

    `plan`: which chose the layout (planning/auto.py), for the run's `config.json`.

    Raises:
        ConfigError: what the user asked for cannot be; nothing was written.
        cli.Exit: stopped by a signal, halted on non-finite values, or the last save failed.
    """
    started = time.monotonic()

    def find() -> list[bool]:
        saved = workdir.has_checkpoint(folder)
        return [saved, saved or (folder / "config.json").exists()]

    saved, resuming = workdir.found_alike(folder, job, find)
    config = workdir.check_resume(folder, config) if resuming else workdir.resolve(config)
    corpus = preparation.ensure(config, console.say, job)
    if resuming:
        workdir.check_resume(folder, config, corpus.fingerprint)
    job.at("starting")
    mesh = make_mesh(config)
    peak = flops.machine_peak(list(mesh.devices.flat), config.model.products)
    with jax.set_mesh(mesh), console.surviving(), ExitStack() as stack:
        run = Run(config, corpus.tokenizer.end_of_text, corpus.tokenizer.vocab_size)
        seconds = save_seconds(run.state_bytes, job)
        about = corpus.described
        if job.count > 1:
            about["watchdog"] = f"{job.watchdog:g} s per step or batch of an evaluation, {seconds:.0f} s per save"
        if plan is not None:
            about["plan"] = f"for {plan['cluster']}, of {plan['layouts']} layouts and meshes: {plan['reason']}"
        console.say(console.table(f"maxsep: {config.name}", run.described() | about))
        if not (resuming and workdir.of_this_machine(folder)):
            job.at("checking kernels")
            if (checked := run.check_kernels(job)) is not None:
                console.say(checked)
        state = None if saved else run.new_state(job)  # may refuse train.init_from: before anything is written
        at, finished = Position(), False
        fingerprints = corpus.fingerprint, corpus.tokenizer.fingerprint
        write_config = partial(workdir.write_config, folder, config, *fingerprints, plan=plan)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.take()
            if not resuming and (folder / "config.json").exists():
                raise ConfigError(
                    f"--workdir: another job has just begun a run in {folder}; the same command resumes it"
                )
            workdir.check_shared(folder, job)
            checkpoints = stack.enter_context(Checkpoints(folder / workdir.CHECKPOINTS, job=job, seconds=seconds))
            if saved:
                state, data, step = checkpoints.restore(run.abstract_state)
                at = Position.saved(step, data)
                finished = step >= config.train.steps and _check_finished(folder, step, config)
            evaluation = job.agree(_logged(folder, at.step).get("eval"))[0]
            if saved and evaluation is not None:  # a kill may have come before the checkpoint kept it too
                checkpoints.evaluated(at.step, evaluation["loss"])
            job.agree(None)  # before the first process writes what all have read
            checkpoints.go_on_from(at.step)
            writer = None
            if job.first and not finished:
                if resuming and not saved and (rows := _rows(folder)):
                    console.say(f"no step was saved: starting anew; {len(rows)} rows of metrics.jsonl are removed")
                write_config(saved=saved)
                writer = stack.enter_context(MetricsWriter(folder, at.step))
        except OSError as e:
            raise ConfigError(f"--workdir: cannot write to {folder}: {e.strerror}") from e
        if finished:
            console.say(f"this run has finished its {at.step} steps; it resumes with more --config.train.steps")
        else:
            if saved:
                console.say(f"resuming from step {at.step} in {folder}")
                if config.train.profile and int(config.train.profile.partition(":")[2]) <= at.step:
                    console.say(f"train.profile: steps {config.train.profile} are done; nothing is recorded")
            for warning in optimizer.warnings(config, at.step):
                console.say(warning)
            Loop(run, corpus, folder, checkpoints, writer, write_config, saved, peak, job).train(
                state, at, evaluation is not None
            )
        job.at("ending")
        if job.first:
            summary.finish(run, corpus, folder, None if finished else time.monotonic() - started)


def _check_finished(folder: Path, step: int, config: Config) -> bool:
    """Whether a run that is to end at `step`, or before, has its result: a signal may have cut the last evaluation off.

    Raises:
        ConfigError: the run was only stopped there, on its way to more steps.
    """
    if not (folder / "metrics.jsonl").exists():
        got = f"{folder} has no metrics.jsonl, which has the figures of the run's {step} steps"
        raise ConfigError(f"--workdir: {got}; takes it back, or more train.steps to resume without it")
    missing = {"train", "eval"} - _logged(folder, step).keys()
    if "train" in missing or (missing and step > config.train.steps):
        least = step + ("train" in missing)
        got = f"got {config.train.steps}, but the run in {folder} was stopped after step {step}"
        raise ConfigError(f"train.steps: {got}; takes at least {least}")
    return not missing


def _logged(folder: Path, step: int) -> dict[str, dict]:
    """The rows of this step, by split."""
    return {row["split"]: row for row in _rows(folder) if row["step"] == step}


def _rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return metrics.read_rows(path) if path.exists() else []


def evaluate(config: Config, folder: Path, job: Job = ALONE) -> None:
    """Prints the held-out loss of the run's latest checkpoint; changes nothing."""
    config = workdir.check_resume(folder, config, may_change=workdir.EVALUATION_MAY_CHANGE)
    corpus = preparation.ensure(config, console.say, job)
    workdir.check_resume(folder, config, corpus.fingerprint, workdir.EVALUATION_MAY_CHANGE)
    with jax.set_mesh(make_mesh(config)), Checkpoints(folder / workdir.CHECKPOINTS, True, job) as checkpoints:
        run = Run(config, corpus.tokenizer.end_of_text, corpus.tokenizer.vocab_size)
        console.say(console.table(f"maxsep: {config.name}", run.described() | corpus.described))
        variables, _, step = checkpoints.restore_model(run.abstract_state.variables)
        job.at("compiling")
        scores = run.evaluate(variables, corpus, lambda: job.at("evaluating"), job.waiting)
    console.say(console.table(f"step {step}", summary.held_out(scores["loss"], scores.get("losses", {}), corpus)))
