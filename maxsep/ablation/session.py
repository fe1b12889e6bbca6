"""An ablation from the first run to the report: what has finished is kept, what fails does not stop the others."""

import os
import shutil
from pathlib import Path

from maxsep.ablation import child, tables
from maxsep.ablation.trial import Trial, columns
from maxsep.config import cli
from maxsep.config.paths import REPOSITORY
from maxsep.output.console import say
from maxsep.training.signals import Stop

NEW_TOKENS, PROMPTS = 16, 16  # of a measurement of decoding


class Session:
    """The trials of one ablation.

    Args:
        trials: what to run, checked.
        folder: where their folders are, and the report will be.
        shared: the flags of the config that all have: `--config`, and what overrides it.
        decode: also time decoding, of the runs that stand for the study's strategies.
    """

    def __init__(self, trials: list[Trial], folder: Path, shared: list[str], decode: bool):
        self.trials, self.folder, self.shared, self.decode = trials, folder, shared, decode
        self.results: dict[str, dict] = {}
        self.failed: dict[str, str] = {}
        self.stopped: str | None = None  # the signal
        self.written = ""
        self.drawing = _can_draw()
        self.environment = dict(os.environ)
        # This process only reads, and must not take an accelerator's memory from its children.
        os.environ["JAX_PLATFORMS"] = "cpu"

    def run(self) -> None:
        """Runs every trial that has no result yet."""
        if not self.drawing:
            say("warning: no pictures without matplotlib; pip install -e '.[viz]', then the same command draws them")
        with Stop() as stop:
            for number, trial in enumerate(self.trials, 1):
                stands = trial.name in columns([*self.results, trial.name]).values()  # for one of the study's
                self._run(trial, self.decode and stands, f"{number}/{len(self.trials)} {trial.name}", stop)
                if stop.asked:
                    self.stopped = stop.asked
                    return

    def _run(self, trial: Trial, decode: bool, label: str, stop: Stop) -> None:
        from maxsep.ablation import result  # imports JAX

        found = result.kept(trial)
        if found is not None and (found["decode"] or not decode):
            say(f"{label}: has finished, {_told(found)}")
            self.results[trial.name] = found
            return
        trial.folder.mkdir(parents=True, exist_ok=True)
        say(f"{label}: training")
        log = trial.folder / "log.txt"
        status = child.run(self._training(trial), log, self._dumping(trial), stop)
        if (trial.folder / result.DUMPS).exists():
            result.tidy(trial.folder / result.DUMPS)
        if status == cli.DONE and decode and not stop.asked:
            say(f"{label}: decoding")
            if child.run(self._decoding(trial), trial.folder / "decode.txt", self.environment, stop) and not stop.asked:
                say(f"warning: {label}: decoding failed: {child.why(trial.folder / 'decode.txt')}")
        if stop.asked:
            return
        if status:
            self.failed[trial.name] = f"{child.why(log)} ({child.ended(status)})"
        else:
            try:
                self.results[trial.name] = result.collect(trial)
            except Exception as e:  # a fault of ours; the others' hours are not lost for it
                self.failed[trial.name] = f"trained, but its figures cannot be read: {type(e).__name__}: {e}"
        if trial.name in self.failed:
            say(f"{label}: failed: {self.failed[trial.name]}")
        else:
            say(f"{label}: {_told(self.results[trial.name])}")

    def _training(self, trial: Trial) -> list[str]:
        return [str(REPOSITORY / "train.py"), *self.shared, *trial.flags, f"--workdir={trial.folder}"]

    def _dumping(self, trial: Trial) -> dict[str, str]:
        from maxsep.ablation import result
        from maxsep.measure import buffers

        dumps = trial.folder / result.DUMPS
        if not (trial.folder / "summary.json").exists():  # else the run has finished, and compiles nothing
            shutil.rmtree(dumps, ignore_errors=True)
        # A program from the cache would not be compiled, and nothing told of it.
        return buffers.dumping(self.environment, dumps, "train_step") | {"JAX_ENABLE_COMPILATION_CACHE": "false"}

    def _decoding(self, trial: Trial) -> list[str]:
        from maxsep.ablation import result

        lengths = ",".join(map(str, tables.contexts(trial.config.data.sequence_length)))
        how = [f"--contexts={lengths}", f"--batches={PROMPTS}", f"--new={NEW_TOKENS}", "--repeats=1"]
        how.append(f"--json={trial.folder / result.DECODE}")
        return ["-m", "maxsep.bench", "decode", *self.shared, *trial.flags, *how]

    def report(self, command: str) -> None:
        """Writes what is known now; `command` is the one that goes on with it."""
        from maxsep.ablation import report

        first = self.trials[0].config
        results = [self.results[trial.name] for trial in self.trials if trial.name in self.results]
        left = [trial.name for trial in self.trials if trial.name not in self.results | self.failed]
        model, train = first.model, first.train
        capacity = "dropless" if model.capacity_factor is None else f"capacity {model.capacity_factor}"
        facts = {
            "command": f"`{command}`",
            "model": f"{model.layers} layers of {model.d_model}, {model.experts} experts of {model.d_ff}, "
            f"top {model.top_k}, {capacity}, {model.dtype}, {model.parameters:,} parameters",
            "training": f"{train.steps} steps of {train.batch_size} sequences of {first.data.sequence_length} tokens, "
            f"{train.accumulation} micro-batches each",
            "devices": ", ".join(sorted({result["device_kind"] for result in results})) or "none",
        }
        if any(result["device_kind"] == "cpu" for result in results):
            facts["devices"] = f"simulated, on {os.cpu_count()} CPU cores: their times say nothing about accelerators"
        if left:
            facts["not run yet"] = ", ".join(left)
        agreed = report.write(self.folder, f"Ablation: {first.name}", facts, results, self.failed, self.drawing)
        if agreed:
            say(agreed.text)
        self.written = "ablation.md, ablation.json, ablation.html" + (" and pictures" if self.drawing else "")


def _told(found: dict) -> str:
    loss, step = found["losses"][-1], found["step_seconds"]["median"]
    loss = "not finite" if loss is None else f"{loss:.4f}"
    return f"loss {loss}, {step:.3g} s a step, {found['tokens_per_second']:,.0f} tokens/s"


def _can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True
