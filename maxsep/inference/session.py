"""What infer.py does once its flags are right: loads a run's model, then completes prompts or scores texts."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from maxsep.cluster.job import ALONE, Job
from maxsep.config import Config, paths
from maxsep.inference import score
from maxsep.inference.generate import Completion, Generator
from maxsep.inference.load import load
from maxsep.inference.program import Program
from maxsep.inference.sampling import Sampling
from maxsep.inference.texts import Prompt
from maxsep.measure.timing import spread
from maxsep.output import metrics
from maxsep.output.console import say, table
from maxsep.output.durable import write_asked
from maxsep.parallel.mesh import describe, make_mesh


class Session:
    """A run's model on its mesh.

    Args:
        config: the run's, on the mesh that is to be used.
        folder: of the run.
        step: of the checkpoint: a number, `latest` or `best`.
        tokenizer: the run's.
        job: this process and the others.

    Raises:
        ConfigError: the checkpoint cannot be used.
    """

    def __init__(self, config: Config, folder: Path, step: str, tokenizer, job: Job = ALONE):
        begin = time.perf_counter()
        self.config, self.tokenizer, self.mesh, self.job = config, tokenizer, make_mesh(config), job
        with jax.set_mesh(self.mesh):
            of = tokenizer.end_of_text, tokenizer.vocab_size
            self.program = Program(config, *of, stops=tokenizer.stops)
            self.weights, number = load(self.program, folder, step, job)
        on = f"{describe(list(self.mesh.devices.flat))}, {config.layout}: {config.mesh}"
        say(f"maxsep: {paths.shown(folder)}, step {number}, {config.model.dtype}, on {on}")
        say(f"loaded in {time.perf_counter() - begin:.1f} s")

    def generate(
        self, prompts: list[Prompt], most: int, sampling: Sampling, batch_size: int, file: str | None
    ) -> list[Completion]:
        """Completes the prompts and prints them as they come; `most` new tokens each, `file` for JSON lines."""
        done: list[Completion] = []
        with jax.set_mesh(self.mesh):
            generator = Generator(self.program, self.weights, self.job)
            begin = time.perf_counter()
            for first in range(0, len(prompts), batch_size):
                batch = prompts[first : first + batch_size]
                # The last token needs no place in the context: nothing comes after it.
                room = [self.config.data.sequence_length - len(prompt.ids) + 1 for prompt in batch]
                limits = [min(most, more) for more in room]
                stream = Stream(self.tokenizer, batch, limits)
                ids = [prompt.ids for prompt in batch]
                rows = min(batch_size, len(prompts))
                done += generator.complete(ids, limits, sampling, first, rows, stream.told)
        seconds = time.perf_counter() - begin - generator.compile_seconds
        say("")
        say(self._times(prompts, done, most, seconds, generator.compile_seconds))
        if file is not None and self.job.first:
            rows = (
                {
                    "prompt": prompt.text,
                    "tokens": completion.tokens,
                    "logprobs": completion.logprobs,
                    "text": continuation(self.tokenizer, prompt.ids, completion.tokens),
                    "ended": completion.ended,
                    "ttft_seconds": completion.first,
                    "tpot_seconds": completion.tpot_seconds,
                }
                for prompt, completion in zip(prompts, done, strict=True)
            )
            _write(file, rows)
        return done

    def _times(self, prompts, done, most, seconds: float, compiling: float) -> str:
        """What the field tells of latency, as a table."""
        tokens = sum(completion.count for completion in done)
        full = sum(not completion.ended and completion.count < most for completion in done)
        entries = {
            "prompts": f"{len(done)}, {sum(len(prompt.ids) for prompt in prompts)} tokens",
            "new tokens": f"{tokens}; {sum(completion.ended for completion in done)} reached the end of a text",
            "TTFT": _spread([completion.first for completion in done]),
            "TPOT": _spread([completion.tpot_seconds for completion in done if completion.tpot_seconds is not None]),
            "speed": f"{tokens / seconds:,.1f} tokens/s, {tokens / seconds / self.mesh.size:,.1f} per device",
            "compiled in": f"{compiling:.1f} s, not counted above",
        }
        if full:
            entries["stopped"] = f"{full} at {self.config.data.sequence_length} tokens in all (data.sequence_length)"
        return table("times", entries)

    def score(self, texts: Sequence[Sequence[int]], batch_size: int, file: str | None) -> None:
        """Prints the perplexity of the texts; writes each token's log-probability to `file` as JSON lines."""
        begin = time.perf_counter()
        with jax.set_mesh(self.mesh):
            found = score.score(self.program, self.weights, texts, batch_size, self.job)
        count = sum(map(len, found))
        entries = {"texts": f"{len(texts)}, {sum(map(len, texts))} tokens, {count} of them after another"}
        if count:
            loss = -math.fsum(map(math.fsum, found)) / count
            entries["loss"] = f"{loss:.6f} nats/token (perplexity {metrics.perplexity(loss):,.2f})"
        entries["time"] = f"{time.perf_counter() - begin:.1f} s, compiling included"
        say(table("scores", entries))
        if file is not None and self.job.first:
            _write(file, ({"tokens": list(ids), "logprobs": [None, *of]} for ids, of in zip(texts, found, strict=True)))


class Stream:
    """Prints a batch's prompts and their completions in order, each as far as it has come."""

    def __init__(self, tokenizer, prompts: list[Prompt], limits: list[int]):
        self.tokenizer, self.prompts, self.limits = tokenizer, prompts, limits
        self.row, self.printed = 0, 0

    def told(self, completions: list[Completion]) -> None:
        while self.row < len(completions):
            prompt, completion = self.prompts[self.row], completions[self.row]
            finished = completion.ended or completion.count >= self.limits[self.row]
            text = prompt.text + continuation(self.tokenizer, prompt.ids, completion.tokens)
            if not finished:
                text = text.rstrip("\ufffd")  # of a character the last bytes may still be missing
            print(text[self.printed :], end="\n" if finished else "", flush=True)
            self.printed = max(self.printed, len(text))
            if not finished:
                return
            self.row, self.printed = self.row + 1, 0
            if self.row < len(completions):
                print(flush=True)


def continuation(tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of `tokens` after `prompt`: some tokenizers drop a space where a text begins."""
    return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    return ", ".join(f"{name} {figure * 1e3:,.2f} ms" for name, figure in spread(seconds).items() if name != "min")


def _write(file: str, rows) -> None:
    write_asked("--json", file, "".join(f"{json.dumps(row)}\n" for row in rows))
    say(f"written: {file}")
