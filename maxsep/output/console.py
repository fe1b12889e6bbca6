"""What a run prints: aligned tables, a line a logged row, and on a terminal a progress bar below them."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping

from maxsep.config import streams

_surviving = False
_lost: OSError | None = None


@contextlib.contextmanager
def surviving() -> Iterator[None]:
    """Within, printing never ends the program: what standard output does not take is left out.

    Why it does not is told once on standard error; that its reader has gone is for the caller, who asks `unread`.
    """
    global _surviving, _lost
    _surviving, _lost = True, None
    try:
        yield
    finally:
        _surviving = False


def unread() -> bool:
    """Whether standard output's reader has gone, since `surviving` was entered."""
    return isinstance(_lost, BrokenPipeError)


def say(text: str) -> None:
    _print(lambda: print(text, flush=True))


def _print(printing: Callable[[], None]) -> None:
    """Raises OSError where it fails, unless `surviving`."""
    global _lost
    try:
        printing()
    except OSError as error:
        if not _surviving:
            raise
        streams.lost()  # nothing more comes of printing, nor fails
        told, _lost = _lost is not None, error
        if not told and not unread():
            with contextlib.suppress(OSError):
                why = f"warning: standard output cannot be written ({error.strerror}); the run continues in silence"
                print(why, file=sys.stderr, flush=True)


def table(title: str, entries: Mapping[str, object]) -> str:
    """`entries` in two columns under a title."""
    width = max(map(len, entries))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in entries.items())])


def line(row: Mapping, steps: int) -> str:
    """A row of `metrics.jsonl` for people; figures that it lacks are left out."""
    if row["split"] == "eval":
        loss = (("eval loss", "loss", "{:.4f}".format), ("perplexity", "perplexity", "{:,.1f}".format))
    else:
        loss = (("loss", "loss", "{:.4f}".format),)
    figures = (
        *loss,
        ("lr", "learning_rate", "{:.1e}".format),
        ("grad", "grad_norm", "{:.2f}".format),
        ("tok/s", "tokens_per_second", "{:,.0f}".format),
        ("mfu", "mfu", "{:.1%}".format),
        ("dropped", "dropped_fraction", "{:.1%}".format),
        ("experts max/mean", "expert_load_max_over_mean", "{:.2f}".format),
    )
    parts = [f"step {row['step']:>{len(str(steps))}}/{steps}"]
    for label, key, shown in figures:
        if row.get(key) is not None:
            parts.append(f"{label} {shown(row[key])}")
        elif key in row and key != "mfu":  # which is None on unknown devices; else None was not finite
            parts.append(f"{label} nan")
    if losses := row.get("losses"):
        parts.append(", ".join(f"{name} {'nan' if loss is None else f'{loss:.4f}'}" for name, loss in losses.items()))
    if len(epochs := row.get("epochs", {})) > 1:
        parts.append("epochs " + ", ".join(f"{name} {epoch:.2f}" for name, epoch in epochs.items()))
    return "  ".join(parts)


class Progress:
    """Prints lines, and on a terminal keeps a progress bar below them.

    Args:
        steps: optimizer steps of the whole run.
        step: those done before.
    """

    def __init__(self, steps: int, step: int = 0):
        self._bar = None
        if sys.stdout.isatty():
            from rich import progress

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, transient=True)
            self._task = self._bar.add_task("training", total=steps, completed=step)
            self._bar.start()

    def step(self, step: int) -> None:
        """`step` optimizer steps are done."""
        if self._bar is not None:
            _print(lambda: self._bar.update(self._task, completed=step))

    def print(self, text: str) -> None:
        if self._bar is None:
            say(text)
        else:
            _print(lambda: self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc) -> None:
        if self._bar is not None:
            _print(self._bar.stop)
