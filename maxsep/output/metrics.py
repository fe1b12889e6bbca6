"""The rows of a run: their writer, and what its figures mean that are not FLOPs. docs/metrics.md says it to users."""

import json
import math
from pathlib import Path

import jax
import numpy as np

from maxsep.config import ConfigError
from maxsep.output import events
from maxsep.output.durable import Appended, finite, write_text


def perplexity(loss: float) -> float:
    """e to the cross-entropy in nats."""
    return math.inf if loss > 700 else math.exp(loss)


def expert_load(counts_le: np.ndarray) -> dict:
    """How evenly the choices fell on the experts.

    Args:
        counts_le: choices of each expert, layers × experts, before any are dropped.

    Returns:
        `expert_load_max_over_mean` of the worst layer (1 is even, the number of experts is all on one), `max_violation`
        (that less 1: MaxVio of arXiv:2408.15664), and a list a layer under `layers`: the same, `expert_load_entropy`
        (of the experts' shares, over the logarithm of their number: 1 is even, 0 is all on one) and `experts_used`
        (share with at least one choice).
    """
    counts_le = np.asarray(counts_le, np.float64)
    experts = counts_le.shape[1]
    shares_le = counts_le / np.maximum(counts_le.sum(axis=1, keepdims=True), 1)  # a batch may be all padding
    nats_l = 0 - np.sum(shares_le * np.log(np.where(shares_le > 0, shares_le, 1)), axis=1)
    max_over_mean_l = shares_le.max(axis=1) * experts
    layers = {
        "expert_load_max_over_mean": max_over_mean_l.tolist(),
        "max_violation": (max_over_mean_l - 1).tolist(),
        "expert_load_entropy": (nats_l / math.log(experts) if experts > 1 else nats_l + 1).tolist(),
        "experts_used": np.mean(counts_le > 0, axis=1).tolist(),
    }
    worst = float(max_over_mean_l.max())
    return {"expert_load_max_over_mean": worst, "max_violation": worst - 1, "layers": layers}


def expert_shares(counts_le: np.ndarray) -> list[list[float]]:
    """Each expert's share of its layer's choices, layers × experts."""
    counts_le = np.asarray(counts_le, np.float64)
    return (counts_le / np.maximum(counts_le.sum(axis=1, keepdims=True), 1)).tolist()


def device_memory() -> dict[str, int]:
    """`memory_peak_bytes` and `memory_limit_bytes` of the fullest device of this process; {} where none tells."""
    stats = [s for s in (device.memory_stats() for device in jax.local_devices()) if s and "peak_bytes_in_use" in s]
    if not stats:
        return {}
    fullest = max(stats, key=lambda s: s["peak_bytes_in_use"])
    memory = {"memory_peak_bytes": fullest["peak_bytes_in_use"]}
    return memory | ({"memory_limit_bytes": fullest["bytes_limit"]} if "bytes_limit" in fullest else {})


class MetricsWriter:
    """Writes rows to `metrics.jsonl` and to TensorBoard events under `tensorboard/`.

    What the disk does not take now is kept, and written when it does.

    Args:
        workdir: the run's folder, which must exist.
        from_step: the step that the run goes on from. Rows of later steps are removed, as is a line that a kill tore:
            each step is logged once, however often the run was killed.
    """

    def __init__(self, workdir: Path, from_step: int = 0):
        self._workdir = workdir
        self._waiting: list[tuple[bytes, bytes]] = []  # rows, and their events
        self._open(from_step)

    def rewind(self, from_step: int) -> None:
        """Goes back to a step, as a new writer does.

        Raises:
            OSError: the disk takes nothing.
        """
        self.flush()
        self.close()
        self._open(from_step)

    def _open(self, from_step: int) -> None:
        path = self._workdir / "metrics.jsonl"
        if path.exists():
            rows = [row for row in read_rows(path) if row["step"] <= from_step]
            write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
        self._rows = Appended(path)
        self._events = Appended(events.new_file(self._workdir / "tensorboard"))
        self._events.append(events.start(from_step + 1))

    def write(self, step: int, split: str, values: dict) -> dict:
        """Takes one row; `flush` has it written.

        Args:
            step: finished optimizer steps.
            split: train, eval.
            values: figures by name; under `layers` lists of a figure a layer. What is not finite becomes null.
                `expert_shares` is no TensorBoard event.

        Returns:
            The row.
        """
        row = finite({"step": step, "split": split, **values})
        scalars = {}
        for name, value in values.items():
            if isinstance(value, dict) and name != "layers":  # a figure by source
                scalars |= {f"{split}/{name}/{source}": figure for source, figure in value.items()}
            elif name not in ("layers", "expert_shares"):
                scalars[f"{split}/{name}"] = value
        for name, per_layer in values.get("layers", {}).items():
            scalars |= {f"{split}_layers/{name}/{layer}": value for layer, value in enumerate(per_layer)}
        shown = {tag: value for tag, value in scalars.items() if value is not None and math.isfinite(value)}
        self._waiting.append((json.dumps(row, allow_nan=False).encode() + b"\n", events.scalars(step, shown)))
        return row

    def flush(self) -> None:
        """Has all rows on disk when it returns.

        Raises:
            OSError: the disk takes nothing, or the folder has gone. Calling again tries again.
        """
        self._rows.check()
        while self._waiting:
            row, event = self._waiting[0]
            self._rows.append(row)
            self._waiting[0] = (b"", event)  # if the other file fails
            self._events.append(event)
            self._waiting.pop(0)

    def close(self) -> None:
        self._rows.close()
        self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`. A last line that a kill tore is left out, and so are empty ones.

    Raises:
        ConfigError: another line is no row.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n") or not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int) or not isinstance(row["split"], str):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--workdir: {path}:{number} is damaged, it is no row of a run; takes the line as it was, or none"
            ) from None
        rows.append(row)
    return rows
