"""An ablation from the first run to the report: what has finished is kept, what fails does not stop the others."""

import os
from collections.abc import Mapping
from pathlib import Path

from maxsep.ablation import kept, tables
from maxsep.ablation.trial import Trial, columns
from maxsep.cluster import child
from maxsep.cluster.signals import Stop
from maxsep.config import cli, segments
from maxsep.config.matrices import parameters
from maxsep.config.paths import REPOSITORY
from maxsep.output.console import say
from maxsep.parallel.start import cores

NEW_TOKENS, PROMPTS = 16, 16  # of a measurement of decoding


class Session:
    """The trials of one ablation.

    Args:
        trials: what to run, checked.
        folder: where their folders are, and the report will be.
        shared: the flags of the config that all have: `--config`, and what overrides it.
        decode: also time decoding, of the runs that stand for the study's strategies.
    """

    def __init__(
        self, trials: list[Trial], folder: Path, shared: list[str], decode: bool, planned: Mapping[str, float]
    ):
        self.trials, self.folder, self.shared, self.decode = trials, folder, shared, decode
        self.planned = planned  # seconds of a step on another machine, by run
        self.trained: list[Trial] = []
        self.failed: dict[str, str] = {}  # why, of the runs that did not end well
        self.not_decoded: dict[str, str] = {}  # why, of those whose decoding could not be timed
        self.status = cli.DONE  # of the first that failed
        self.stopped: str | None = None  # the signal
        self.drawing = _can_draw()
        self.environment = dict(os.environ)

    def run(self) -> None:
        """Trains every trial that has not finished, and times decoding where that is asked for."""
        if not self.drawing:
            say("warning: no pictures without matplotlib; pip install -e '.[viz]', then the same command draws them")
        with Stop() as stop:
            for number, trial in enumerate(self.trials, 1):
                self._run(trial, f"{number}/{len(self.trials)} {trial.name}", stop)
                if stop.asked:
                    self.stopped = stop.asked
                    return

    def _run(self, trial: Trial, label: str, stop: Stop) -> None:
        if kept.result(trial) or kept.summary(trial):
            say(f"{label}: has finished, {_told(trial)}")
        elif not self._train(trial, label, stop):
            return
        self.trained.append(trial)
        names = [one.name for one in self.trained]
        stands = trial.name in columns(names).values()  # for one of the study's strategies
        if self.decode and stands and not (trial.folder / kept.DECODE).exists() and not stop.asked:
            say(f"{label}: decoding")
            log = trial.folder / "decode.txt"
            status = child.run(self._decoding(trial), log, self.environment, stop)
            if status != cli.DONE and not stop.asked:
                self.not_decoded[trial.name] = child.why(log, status)
                self.status = self.status or child.shell_status(status)
                say(f"warning: {label}: decoding failed: {self.not_decoded[trial.name]}")

    def _train(self, trial: Trial, label: str, stop: Stop) -> bool:
        """Whether it has ended well."""
        trial.folder.mkdir(parents=True, exist_ok=True)
        say(f"{label}: training")
        log, dumps = trial.folder / "log.txt", trial.folder / kept.DUMPS
        flags = f"--xla_dump_to={dumps} --xla_dump_hlo_module_re=.*train_step.* --xla_dump_hlo_as_text"
        environment = self.environment | {
            "XLA_FLAGS": f"{self.environment.get('XLA_FLAGS', '')} {flags}".strip(),
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # of a program from the cache nothing would be told
        }
        status = child.run(self._training(trial), log, environment, stop)
        if dumps.exists():
            kept.tidy(dumps)
        if status == cli.DONE:
            say(f"{label}: {_told(trial)}")
        elif not stop.asked:
            self.failed[trial.name] = child.why(log, status)
            self.status = self.status or child.shell_status(status)
            say(f"{label}: failed: {self.failed[trial.name]}")
        return status == cli.DONE

    def _training(self, trial: Trial) -> list[str]:
        return [str(REPOSITORY / "train.py"), *self.shared, *trial.flags, f"--workdir={trial.folder}"]

    def _decoding(self, trial: Trial) -> list[str]:
        lengths = ",".join(map(str, tables.contexts(trial.config.data.sequence_length)))
        how = [f"--contexts={lengths}", f"--batches={PROMPTS}", f"--new={NEW_TOKENS}", "--repeats=1"]
        how.append(f"--json={trial.folder / kept.DECODE}")
        return ["-m", "maxsep.bench", "decode", *self.shared, *trial.flags, *how]

    def _results(self) -> list[dict]:
        """Of all trials that have ended well. JAX starts here: with its threads no child may be started any more."""
        os.environ["JAX_PLATFORMS"] = "cpu"  # files are read; nothing runs
        from maxsep.ablation import result

        found = []
        for trial in self.trained:
            try:
                found.append(kept.result(trial) or result.collect(trial))
            except Exception as e:  # a fault of ours; the others' hours are not lost for it
                self.failed[trial.name] = f"trained, but its figures cannot be read: {type(e).__name__}: {e}"
                self.status = self.status or cli.outcome(e)[0]
                say(f"{trial.name}: {self.failed[trial.name]}")
        return found

    def report(self, command: str) -> str:
        """Writes what is known now, and says what that is; `command` is the one that goes on with it."""
        from maxsep.ablation import report

        first = self.trials[0].config
        results = [result | {"planned_seconds": self.planned.get(result["name"])} for result in self._results()]
        known = {result["name"] for result in results} | self.failed.keys()
        left = [trial.name for trial in self.trials if trial.name not in known]
        model, train = first.model, first.train
        capacity = "dropless" if model.capacity_factor is None else f"capacity {model.capacity_factor}"
        facts = {
            "command": f"`{command}`",
            "model": f"{segments.described(model)}, "
            f"top {model.top_k}, {capacity}, {model.dtype}, {parameters(model):,} parameters",
            "training": f"{_steps(results, train.steps)} of {train.batch_size} sequences of "
            f"{first.data.sequence_length} tokens, {train.accumulation} micro-batches each",
            "devices": ", ".join(sorted({result["device_kind"] for result in results})) or "none",
        }
        if any(result["device_kind"] == "cpu" for result in results):
            facts["devices"] = f"simulated, on {cores()} CPU cores: their times say nothing about accelerators"
        if left:
            facts["not run yet"] = ", ".join(left)
        if self.not_decoded:
            facts["decoding failed"] = "; ".join(f"{name}: {why}" for name, why in self.not_decoded.items())
        agreed = report.write(self.folder, f"Ablation: {first.name}", facts, results, self.failed, self.drawing)
        if agreed:
            say(agreed.text)
        return "ablation.md, ablation.json, ablation.html" + (" and pictures" if self.drawing else "")


def _steps(results: list[dict], asked: int) -> str:
    """How long the runs were, which may have finished before fewer steps were asked for."""
    counts = sorted({result["steps"][-1] for result in results})
    if not counts:
        return f"{asked} steps"
    return f"{counts[0]} steps" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} steps"


def _told(trial: Trial) -> str:
    summary = kept.summary(trial)
    loss = "not finite" if summary["train_loss"] is None else f"{summary['train_loss']:.4f}"
    return f"loss {loss}, {summary['step_seconds']:.3g} s per step, {summary['tokens_per_second']:,.0f} tokens/s"


def _can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True
