"""Definitions of every figure that a run reports, and their writer. docs/metrics.md says the same to users."""

import errno
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxsep.config import ModelConfig
from maxsep.output.durable import finite, write_text

# Dense peak of matrix products with float32 accumulation, 1e12 FLOP/s a device, from the makers' data sheets: bfloat16,
# float32, float64. None: the device has no such unit, or the sheet no such figure. float32 is what JAX does with
# float32 products by default: TF32 on NVIDIA GPUs from Ampere on, bfloat16 passes on TPUs.
# The first name that begins the device's kind counts, so longer names come first.
PEAKS: dict[str, tuple[float | None, float | None, float | None]] = {
    "NVIDIA GB200": (2500, 1250, 40),
    "NVIDIA B200": (2250, 1125, 37),
    "NVIDIA GH200": (989.4, 494.7, 67),
    "NVIDIA H200 NVL": (835.5, 417.5, 60),
    "NVIDIA H200": (989.4, 494.7, 67),
    "NVIDIA H100 NVL": (835.5, 417.5, 60),
    "NVIDIA H100 PCIe": (756, 378, 51),
    "NVIDIA H100": (989.4, 494.7, 67),
    "NVIDIA A100": (312, 156, 19.5),
    "NVIDIA A40": (149.7, 74.8, None),
    "NVIDIA A30": (165, 82, 10.3),
    "NVIDIA A10G": (70, 35, None),
    "NVIDIA A10": (125, 62.5, None),
    "NVIDIA RTX A6000": (154.8, 77.4, None),
    "NVIDIA L40S": (362, 183, None),
    "NVIDIA L40": (181, 90.5, None),
    "NVIDIA L4": (121, 60, None),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8, None),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, None),
    "NVIDIA GeForce RTX 3090": (71, 35.6, None),
    "Tesla V100": (None, 15.7, 7.8),
    "Tesla T4": (None, 8.1, None),
    "TPU v2": (22.5, 22.5, None),  # a device is a core, half a chip
    "TPU v3": (61.5, 61.5, None),  # likewise
    "TPU v4": (275, 275, None),
    "TPU v5 lite": (197, 197, None),  # v5e
    "TPU v5": (459, 459, None),  # v5p
    "TPU v6 lite": (918, 918, None),  # v6e
    "TPU7x": (1153.5, 1153.5, None),  # a device is half a chip
}


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of a training step, a token: those of the matrix products that the model needs.

    Forward and backward are three times forward. Causal attention has (sequence_length / 2) keys a token on average;
    the embedding's look-up, norms, softmax and what rematerialisation repeats count nothing (MFU as in PaLM,
    arXiv:2204.02311, appendix B, but causal).
    """
    width = model.heads * model.head_size
    projections = 2 * model.d_model * (width + model.n_kv_heads * model.head_size)
    scores = 2 * width * sequence_length / 2
    router = model.d_model * model.experts
    matrices = 3 if model.activation == "swiglu" else 2
    experts = model.top_k * matrices * model.d_model * model.d_ff
    head = model.d_model * model.vocab_size
    return 3 * 2 * (model.layers * (projections + scores + router + experts) + head)


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """FLOP/s that one device's data sheet promises for matrix products in `dtype`; None where it is not known."""
    column = ("bfloat16", "float32", "float64").index(dtype)
    for kind, peaks in PEAKS.items():
        if device.device_kind.startswith(kind):
            return peaks[column] and peaks[column] * 1e12
    return None


class Product:
    """A square matrix product on every device of a mesh at once, waited for: `flops` operations."""

    def __init__(self, mesh: Mesh, dtype: str):
        size = 1536 if mesh.devices.flat[0].platform == "cpu" else 8192
        shape, sharding = (mesh.size, size, size), NamedSharding(mesh, P(mesh.axis_names))
        # A float32 result: for a bfloat16 one XLA's CPU backend may take twice as long.
        wide = jnp.promote_types(dtype, jnp.float32)
        with jax.set_mesh(mesh):  # whatever mesh the run has set
            self.x = jax.jit(partial(jax.random.normal, shape=shape, dtype=dtype, out_sharding=sharding))(
                jax.random.key(0)
            )
            multiply = partial(jnp.einsum, "nij,njk->nik", preferred_element_type=wide)
            self.multiply = jax.jit(multiply).lower(self.x, self.x).compile()
        self.flops = 2 * mesh.size * size**3

    def __call__(self) -> None:
        self.multiply(self.x, self.x).block_until_ready()


def measured_peak(dtype: str) -> float:
    """FLOP/s of matrix products on the machine's CPU, the best of a few. Takes about 0.2 s.

    One simulated device's product uses all cores, so this is the peak of all of them together.
    """
    product = Product(Mesh(jax.devices("cpu")[:1], ("one",), axis_types=(AxisType.Explicit,)), dtype)
    seconds = []
    while len(seconds) < 3 or (sum(seconds) < 0.2 and len(seconds) < 20):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return product.flops / min(seconds)


def machine_peak(devices: list[jax.Device], dtype: str) -> float | None:
    """FLOP/s of all `devices` together: from data sheets, or measured on a CPU. None where a device is not known."""
    if devices[0].platform == "cpu":
        return measured_peak(dtype)
    peaks = [peak_flops(device, dtype) for device in devices]
    return None if None in peaks else sum(peaks)


def mfu(tokens_per_second: float, flops_a_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation: the share of `peak` that the model's own matrix products take."""
    return None if peak is None else tokens_per_second * flops_a_token / peak


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
            if name != "layers":
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
