"""Floating-point operations: those a model needs, those a machine can do, and the share that a run uses."""

import time
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxsep.config import ModelConfig
from maxsep.config.cluster import PRECISIONS
from maxsep.config.matrices import matrices, sizes


def _tpu(bfloat16: float) -> tuple[float, float, float, None]:
    """A TPU makes what JAX calls tensorfloat32 of three bfloat16 products, and float32 of six."""
    return bfloat16, bfloat16 / 3, bfloat16 / 6, None


# Dense peak of matrix products with float32 accumulation, 1e12 FLOP/s per device, in each of `PRECISIONS`, from the
# makers' data sheets. None: the device has no such unit, or the sheet no such figure.
# The first name that begins the device's kind counts, so longer names come first.
PEAKS: dict[str, tuple[float | None, float | None, float | None, float | None]] = {
    "NVIDIA GB200": (2500, 1250, 80, 40),
    "NVIDIA B200": (2250, 1125, 75, 37),
    "NVIDIA GH200": (989.4, 494.7, 67, 67),
    "NVIDIA H200 NVL": (835.5, 417.5, 60, 60),
    "NVIDIA H200": (989.4, 494.7, 67, 67),
    "NVIDIA H100 NVL": (835.5, 417.5, 60, 60),
    "NVIDIA H100 PCIe": (756, 378, 51, 51),
    "NVIDIA H100": (989.4, 494.7, 67, 67),
    "NVIDIA A100": (312, 156, 19.5, 19.5),
    "NVIDIA A40": (149.7, 74.8, 37.4, None),
    "NVIDIA A30": (165, 82, 10.3, 10.3),
    "NVIDIA A10G": (70, 35, 31.5, None),
    "NVIDIA A10": (125, 62.5, 31.2, None),
    "NVIDIA RTX A6000": (154.8, 77.4, 38.7, None),
    "NVIDIA L40S": (362, 183, 91.6, None),
    "NVIDIA L40": (181, 90.5, 90.5, None),
    "NVIDIA L4": (121, 60, 30.3, None),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8, 104.8, None),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6, None),
    "NVIDIA GeForce RTX 3090": (71, 35.6, 35.6, None),
    "Tesla V100": (None, None, 15.7, 7.8),
    "Tesla T4": (None, None, 8.1, None),
    "TPU v2": _tpu(22.5),  # a device is a core, half a chip
    "TPU v3": _tpu(61.5),  # likewise
    "TPU v4": _tpu(275),
    "TPU v5 lite": _tpu(197),  # v5e
    "TPU v5": _tpu(459),  # v5p
    "TPU v6 lite": _tpu(918),  # v6e
    "TPU7x": _tpu(1153.5),  # a device is half a chip
}


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of a training step, a token: those of the matrix products that the model needs.

    Forward and backward are three times forward. Causal attention has (sequence_length / 2) keys a token on average;
    the embedding's look-up, norms, softmax and what rematerialisation repeats count nothing (MFU as in PaLM,
    arXiv:2204.02311, appendix B, but causal).
    """
    multiplied = sum(matrix.used * matrix.size(sizes(model)) for matrix in matrices(model))
    scores = model.layers * 2 * model.heads * model.head_size * sequence_length / 2
    return 3 * 2 * (multiplied + scores)


def peak_flops(device: jax.Device, products: str) -> float | None:
    """FLOP/s that one device's data sheet promises for matrix products; None where it is not known.

    `products` is one of `PRECISIONS`. Where a device has no TF32, it makes them in float32.
    """
    for kind, peaks in PEAKS.items():
        if device.device_kind.startswith(kind):
            by_name = dict(zip(PRECISIONS, peaks, strict=True))
            peak = by_name[products] or (by_name["float32"] if products == "tf32" else None)
            return peak and peak * 1e12
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


@cache
def measured_peak(dtype: str) -> float:
    """FLOP/s of matrix products on the machine's CPU, the best of a few. Takes about 0.2 s, once a process.

    One simulated device's product uses all cores, so this is the peak of all of them together.
    """
    with jax.enable_x64(dtype == "float64"):
        product = Product(Mesh(jax.devices("cpu")[:1], ("one",), axis_types=(AxisType.Explicit,)), dtype)
    seconds = []
    while len(seconds) < 3 or (sum(seconds) < 0.2 and len(seconds) < 20):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return product.flops / min(seconds)


def machine_peak(devices: list[jax.Device], products: str) -> float | None:
    """FLOP/s of all `devices` together: from data sheets, or measured on a CPU. None where a device is not known."""
    if devices[0].platform == "cpu":
        return measured_peak("float32" if products == "tf32" else products)
    peaks = [peak_flops(device, products) for device in devices]
    return None if None in peaks else sum(peaks)


def mfu(tokens_per_second: float, flops_a_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation: the share of `peak` that the model's own matrix products take."""
    return None if peak is None else tokens_per_second * flops_a_token / peak
