"""Each row's planned step beside the measured one: as a table, and as lines of a Markdown table."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from maxsep.config import ConfigError, cli, paths
from maxsep.measure.report import columns
from maxsep.planning import calibration
from maxsep.planning.planned import Plan
from maxsep.planning.rows import Row
from maxsep.planning.table import giga

STEPS, WARMUP = 5, 1  # of each row
HEAD = "| config | devices | planned GB | measured GB | planned s | measured s | roofline over measured |"


@dataclass(frozen=True)
class Measured:
    """A row of a plan, and what `bench train` has measured of it."""

    row: Row
    seconds: float  # a step's median
    memory_bytes: int | None  # per device, as the compiler counts it there


def measure(plan: Plan, shared: Sequence[str], folder: Path, say: Callable[[str], None]) -> list[Measured]:
    """Trains each row that fits for a few steps, one row after the other. Reports rows that fail, and leaves them out.

    Args:
        plan: of this machine's devices.
        shared: arguments that say which config it is.
        folder: for what the runs write.
        say: takes a line of progress.

    Raises:
        cli.Exit: a signal has stopped it, or every row has failed.
    """
    rows = [row for row in plan.rows if row.fits]
    found, failed = [], None
    for number, row in enumerate(rows, 1):
        out = folder / "bench.json"
        flags = [f"--steps={STEPS}", f"--warmup={WARMUP}", f"--json={out}", *shared, *row.flags]
        try:
            calibration.run(["-m", "maxsep.bench", "train", *flags], folder / "bench.log", plan.cluster, "the bench")
        except (ConfigError, cli.Exit) as e:
            if isinstance(e, cli.Exit) and e.status != cli.CRASHED:
                raise
            failed = e
            say(f"warning: {row.name} is left out: {e}")
            continue
        result = json.loads(out.read_text(encoding="utf-8").splitlines()[0])
        memory = result["memory"] and sum(result["memory"].values())
        found.append(Measured(row, result["median_seconds"], memory))
        planned = f"{row.step_seconds:.3g} s planned"
        say(f"[{number}/{len(rows)}] {row.name}: {found[-1].seconds:.3g} s per step, {planned}")
    if not found:
        raise failed or cli.Exit(cli.CRASHED, f"nothing to measure: {plan.reason}")
    return found


def text(measured: Sequence[Measured], fitted: Plan) -> list[str]:
    """A table for people: the fastest first.

    Args:
        measured: with the rows as they were planned before.
        fitted: the plan at the rates that were fitted to what was measured.
    """
    again = {(row.name, row.inner): row for row in fitted.rows}
    cells = []
    for one in sorted(measured, key=lambda one: one.seconds):
        now = again[one.row.name, one.row.inner].step_seconds
        there = "unknown" if one.memory_bytes is None else giga(one.memory_bytes)
        figures = [f"{value:.4g}" for value in (one.row.step_seconds, now, one.seconds)]
        cells.append((one.row.name, giga(one.row.memory_bytes["total"]), there, *figures, f"{now / one.seconds:.2f}"))
    head = ("layout:mesh", "GB", "GB here", "planned s", "fitted s", "measured s", "fitted / measured")
    return columns([head, *cells])


def append(path: Path, measured: Sequence[Measured], plan: Plan) -> None:
    """Adds a line per row to the table of a Markdown file that has the columns of docs/plan.md's.

    Raises:
        ConfigError: it has no such table, or cannot be written.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    if HEAD not in lines:
        raise ConfigError(f"--table: {paths.shown(path)} has no table with the columns of docs/plan.md; takes one")
    end = lines.index(HEAD)
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    lines[end:end] = [_line(one, plan) for one in measured]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _line(one: Measured, plan: Plan) -> str:
    row, config = one.row, plan.config
    there = "not told" if one.memory_bytes is None else f"{giga(one.memory_bytes)} (the compiler's count there)"
    seconds = f"{row.ranges['step_seconds'][0]:.3g}–{row.ranges['step_seconds'][1]:.3g}"
    share = f"{row.step_seconds / one.seconds:.2f}"
    cells = (
        f"`{config.name}`, `{row.name}`",
        f"{plan.cluster.devices} × {plan.cluster.device}",
        giga(row.memory_bytes["total"]),
        there,
    )
    return f"| {' | '.join([*cells, seconds, f'{one.seconds:.3g}', share])} |"
