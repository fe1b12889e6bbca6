"""The rows of a run: their writer, and what its figures mean that are not FLOPs. docs/metrics.md says it to users."""

import errno
import json
import math
import os
from pathlib import Path

import jax
import numpy as np

from maxsep.output.durable import finite, write_text


def perplexity(loss: float) -> float:
    """e to the cross-entropy in nats."""
    return math.inf if loss > 700 else math.exp(loss)


def expert_load(counts_le: np.ndarray) -> dict:
    """How evenly the choices fell on the experts.

    Args:
        counts_le: choices of each expert, layers × experts, before any are dropped.

    Returns:
        `expert_load_max_over_mean` of the worst layer (1 is even, the number of experts is all on one), and a list a
        layer under `layers`: the same, `expert_load_entropy` (of the experts' shares, over the logarithm of their
        number: 1 is even, 0 is all on one) and `experts_used` (share with at least one choice).
    """
    counts_le = np.asarray(counts_le, np.float64)
    experts = counts_le.shape[1]
    shares_le = counts_le / counts_le.sum(axis=1, keepdims=True)
    nats_l = 0 - np.sum(shares_le * np.log(np.where(shares_le > 0, shares_le, 1)), axis=1)
    max_over_mean_l = shares_le.max(axis=1) * experts
    layers = {
        "expert_load_max_over_mean": max_over_mean_l.tolist(),
        "expert_load_entropy": (nats_l / math.log(experts) if experts > 1 else nats_l + 1).tolist(),
        "experts_used": np.mean(counts_le > 0, axis=1).tolist(),
    }
    return {"expert_load_max_over_mean": float(max_over_mean_l.max()), "layers": layers}


def expert_shares(counts_le: np.ndarray) -> list[list[float]]:
    """Each expert's share of its layer's choices, layers × experts."""
    counts_le = np.asarray(counts_le, np.float64)
    return (counts_le / counts_le.sum(axis=1, keepdims=True)).tolist()


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

    Args:
        workdir: the run's folder, which must exist.
        from_step: the step that the run goes on from. Rows of later steps are removed, as is a line that a kill tore:
            each step is logged once, however often the run was killed.
    """

    def __init__(self, workdir: Path, from_step: int = 0):
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        if path.exists():
            write_text(path, "".join(f"{json.dumps(row)}\n" for row in read_rows(path) if row["step"] <= from_step))
        self._file = path.open("ab", buffering=0)
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=from_step + 1, write_to_disk=True)

    def write(self, step: int, split: str, values: dict) -> dict:
        """Writes one row, which is on disk when this returns.

        Args:
            step: finished optimizer steps.
            split: train, eval.
            values: figures by name; under `layers` lists of a figure a layer. What is not finite becomes null.
                `expert_shares` is no TensorBoard event.

        Returns:
            The row.

        Raises:
            OSError: the disk is full, or the like. What was written of the row counts as torn.
        """
        row = finite({"step": step, "split": split, **values})
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        if self._file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._file.fileno())
        for name, value in values.items():
            if name not in ("layers", "expert_shares"):
                self._event(f"{split}/{name}", value, step)
        for name, per_layer in values.get("layers", {}).items():
            for layer, value in enumerate(per_layer):
                self._event(f"{split}_layers/{name}/{layer}", value, step)
        self._events.flush()
        return row

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _event(self, tag: str, value: float | None, step: int) -> None:
        if value is not None and math.isfinite(value):
            self._events.add_scalar(tag, value, step)


def read_rows(path: Path) -> list[dict]:
    """The whole rows of a `metrics.jsonl`: all but a last line that a kill tore."""
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            rows.append(json.loads(line))
    return rows
