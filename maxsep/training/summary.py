"""What a run ends with: `summary.json`, and the same on the console."""

import json
import math
import statistics
from pathlib import Path

from maxsep.config import cli, paths
from maxsep.config.matrices import parameters
from maxsep.data.mixture import Mixture
from maxsep.data.records import Corpus
from maxsep.output import console, metrics
from maxsep.output.durable import write_json
from maxsep.training.run import Run


def finish(run: Run, corpus: Mixture, folder: Path, seconds: float | None) -> None:
    """Writes `summary.json` from the run's rows, and prints it.

    `seconds` is what this start of the run took; None: it found all steps done, and a summary stays as it is.
    """
    path = folder / "summary.json"
    summary = summarise(run, corpus, folder, seconds)
    before = _before(path) if seconds is None else {}
    if before.get("steps") == summary["steps"]:
        summary = before
    else:  # there is none, or it is of fewer steps: the run was killed before it wrote that of these
        try:
            write_json(path, summary)
        except OSError as e:
            raise cli.Exit(cli.SAVE_FAILED, f"cannot write {path}: {e.strerror}; the run itself is saved") from e
    mfu = "unknown, the device's peak is not known" if summary["mfu"] is None else f"{summary['mfu']:.1%}"
    tokens, seconds = _number(summary["tokens_per_second"]), _number(summary["step_seconds"])
    console.say(
        console.table(
            f"result after step {summary['steps']}",
            {
                **held_out(_number(summary["eval_loss"]), summary.get("eval_losses") or {}, corpus),
                "train loss": f"{_number(summary['train_loss']):.4f} nats/token",
                "speed": f"{tokens:,.0f} tokens/s, {seconds:.3f} s per step, MFU {mfu}",
                "time": f"{_number(summary['seconds']):.0f} s",
                "written": f"{folder}: checkpoints/, metrics.jsonl, summary.json, tensorboard/",
            },
        )
    )
    here = f"--workdir={paths.shown(folder)}"
    console.say(f"complete a text: {paths.command('infer.py', here, '--prompt=Return the')}")
    more = f"--config.train.steps={2 * summary['steps']}"
    console.say(f"train on, at the last learning rate: {paths.command('train.py', here, more)}")


def _before(path: Path) -> dict:
    """The summary there is; empty where there is none, or a damaged one: it follows from the rows."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def summarise(run: Run, corpus: Mixture, folder: Path, seconds: float | None) -> dict:
    """What `summary.json` holds: docs/metrics.md."""
    rows = metrics.read_rows(folder / "metrics.jsonl")
    trained = [row for row in rows if row["split"] == "train"]
    evaluated = [row for row in rows if row["split"] == "eval"]

    def median(name: str) -> float | None:
        values = [row[name] for row in trained if row[name] is not None]
        return statistics.median(values) if values else None

    config = run.config
    return {
        "steps": trained[-1]["step"],
        "parameters": parameters(config.model),
        "train_loss": trained[-1]["loss"],
        "eval_loss": evaluated[-1]["loss"],
        "eval_perplexity": evaluated[-1]["perplexity"],
        **({"eval_losses": evaluated[-1]["losses"]} if corpus.named else {}),
        "eval_tokens": corpus.held_out,
        "unigram_entropy": corpus.unigram_entropy,
        **{name: median(name) for name in ("tokens_per_second", "step_seconds", "mfu")},
        "seconds": seconds,
        "skipped_steps": trained[-1]["skipped_steps"],
        "rollbacks": trained[-1].get("rollbacks", 0),
        "layout": config.layout,
        "bubble": run.bubble,
        "mesh": config.mesh.sizes,
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # JSON has no word for what is not finite


def held_out(loss: float, losses: dict[str, float | None], corpus: Mixture) -> dict[str, str]:
    """The held-out loss, and `losses` of a mixture's sources, beside the unigram cross-entropy, for the console."""
    gain = corpus.unigram_entropy - loss
    compared = f"{abs(gain):.2f} {'better' if gain >= 0 else 'worse'}"
    return {
        "held-out loss": f"{loss:.4f} nats/token (perplexity {metrics.perplexity(loss):,.1f}) "
        f"over {corpus.held_out:,} tokens",
        "unigram": f"{corpus.unigram_entropy:.4f} nats/token on the same tokens: the model is {compared}",
        **{
            f"  {name}": _of_source(_number(losses.get(name)), one)
            for name, one in corpus.corpora.items()
            if corpus.named
        },
    }


def _of_source(loss: float, corpus: Corpus) -> str:
    return f"{loss:.4f} over {corpus.eval.targets:,} tokens (unigram {corpus.unigram_entropy:.4f})"
