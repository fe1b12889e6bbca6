"""Clusters to plan for: what one of their devices can do, and how fast devices reach each other.

`configs/clusters/*.py` describe them, each with a `get_cluster()` that returns a `Cluster`.
"""

import re
import runpy
import traceback
from dataclasses import dataclass, replace

from maxsep.config import paths
from maxsep.config.files import importable
from maxsep.config.paths import REPOSITORY
from maxsep.config.schema import ConfigError

FOLDER = REPOSITORY / "configs" / "clusters"
TAKES = "NAME:NODESxDEVICES, the devices being those of a node, as a100-80gb:4x4"
PRECISIONS = ("bfloat16", "tf32", "float32", "float64")  # of matrix products
RATES = ("products", "memory", "links")
MOST = 1 << 16  # devices


@dataclass(frozen=True)
class Gpu:
    """What XLA asks about a GPU that it compiles for. All sizes are in bytes."""

    name: str  # as the driver gives it
    compute_capability: int  # the major number: 8 for Ampere, 9 for Hopper
    accelerated_features: bool  # instructions of this generation alone: from Hopper on
    cores: int  # streaming multiprocessors
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int  # the most that a kernel can ask for
    l2_cache: int
    clock_ghz: float


@dataclass(frozen=True)
class Tpu:
    """What XLA asks about a TPU that it compiles for."""

    name: str  # of its generation, as JAX's topologies have it: v5e
    kind: str  # as JAX names the device
    slices: dict[int, str]  # by the number of their chips, how these are arranged


@dataclass(frozen=True)
class Cluster:
    """Like devices in `nodes` like nodes; a slice of TPUs is one node.

    Rates are those of data sheets, per device. In a cluster of CPUs (`gpu` and `tpu` are None) the devices are
    simulated on this machine; rates that are None are measured here.
    """

    gpu: Gpu | None
    flops: dict[str, float] | None  # dense peak of matrix products, FLOP/s, by `PRECISIONS`; one left out: no such unit
    memory_bytes: float | None
    memory_bandwidth: float | None  # bytes/s
    inside: float | None  # bytes/s to the devices of the node, in one direction
    between: float | None  # bytes/s to other nodes, in one direction: a device's share of its node's network
    watts: float | None  # power limit; None: unknown
    # What `plan --measure` finds out. Of a cluster that nobody has measured the plan is a roofline.
    latency: float = 0.0  # seconds of each message of a collective beside its bytes: n - 1 on a ring of n devices
    reached: dict[str, float] | None = None  # share of the rates that programs reach, by `RATES`
    spread: tuple[float, float] | None = None  # least and most of measured steps over planned ones
    tpu: Tpu | None = None
    nodes: int = 1
    devices_per_node: int = 1

    @property
    def simulated(self) -> bool:
        return self.gpu is None and self.tpu is None

    @property
    def device(self) -> str:
        """What its devices are, for people."""
        if self.simulated:
            return "simulated CPU device"
        return self.gpu.name if self.gpu else f"TPU {self.tpu.name}"

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


def load_cluster(text: str, field: str = "--cluster") -> Cluster:
    """The cluster that `TAKES` describes. NAME is a file of `configs/clusters`, without its ending, or any file's path.

    `field` names the setting in errors.

    Raises:
        ConfigError: no such cluster, an error in its file, or no number of devices.
    """
    name, _, shape = text.rpartition(":")
    sizes = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", shape.lower())
    if sizes is None or not name:
        raise ConfigError(f"{field}: got {text!r}; takes {TAKES}")
    nodes, devices = int(sizes[1]), int(sizes[2])
    cluster = replace(_of_file(name, field), nodes=nodes, devices_per_node=devices)
    if cluster.tpu and (nodes > 1 or devices not in cluster.tpu.slices):
        takes = f"1xN, one slice of N chips: {', '.join(map(str, cluster.tpu.slices))}"
        raise ConfigError(f"{field}: got {text}; takes {takes}")
    if cluster.simulated and nodes > 1:
        raise ConfigError(f"{field}: got {text}; takes 1x{nodes * devices}, as CPU devices are simulated in one node")
    if cluster.devices > MOST:
        raise ConfigError(f"{field}: got {text} = {cluster.devices} devices; takes at most {MOST}")
    return cluster


def cluster_of(gpu: str) -> str | None:
    """The name of the cluster in `configs/clusters` whose GPU has this name; None: there is none."""
    names = (path.stem.replace("_", "-") for path in sorted(FOLDER.glob("*.py")))
    return next((name for name in names if (found := _of_file(name, "").gpu) and found.name == gpu), None)


def _of_file(name: str, field: str) -> Cluster:
    own = FOLDER / f"{name.lower().replace('-', '_')}.py"
    path = own if own.is_file() else paths.named(field, name)
    if not path.is_file():
        known = ", ".join(sorted(path.stem.replace("_", "-") for path in FOLDER.glob("*.py")))
        raise ConfigError(f"{field}: got {name!r}; takes {known}, or a file like configs/clusters/h100.py")
    importable(path)
    try:
        cluster = runpy.run_path(str(path))["get_cluster"]()
    except Exception as e:  # the file is the user's program: whatever it raises is theirs to mend
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        what = "has no function get_cluster" if repr(e) == "KeyError('get_cluster')" else f"{type(e).__name__}: {e}"
        raise ConfigError(f"{field}: {where}: {what}") from e
    if not isinstance(cluster, Cluster):
        raise ConfigError(f"{field}: {path}: get_cluster() returned {type(cluster).__name__}; takes a Cluster")
    _check(f"{field}: {path}", cluster)
    return cluster


def _check(where: str, cluster: Cluster) -> None:
    """Every rate is a positive number; only those of a CPU, and the power, may be None.

    Raises:
        ConfigError: which is not.
    """

    def need(field: str, value, optional: bool) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
        if not number and not (optional and value is None):
            takes = "a number above 0" + (", or None" if optional else "")
            raise ConfigError(f"{where}: {field}: got {value!r}; takes {takes}")

    if cluster.gpu is not None and not isinstance(cluster.gpu, Gpu):
        raise ConfigError(f"{where}: gpu: got {cluster.gpu!r}; takes a Gpu, or None for simulated devices")
    if cluster.tpu is not None and (not isinstance(cluster.tpu, Tpu) or cluster.gpu is not None):
        raise ConfigError(f"{where}: tpu: got {cluster.tpu!r}; takes a Tpu, or None beside a gpu")
    simulated = cluster.simulated
    for field in ("memory_bytes", "memory_bandwidth", "inside", "between"):
        need(field, getattr(cluster, field), simulated)
    need("watts", cluster.watts, True)
    if cluster.latency:
        need("latency", cluster.latency, False)
    if cluster.reached is not None and (not isinstance(cluster.reached, dict) or set(cluster.reached) != set(RATES)):
        raise ConfigError(f"{where}: reached: got {cluster.reached!r}; takes None, or shares of {', '.join(RATES)}")
    for name, share in (cluster.reached or {}).items():
        need(f"reached[{name!r}]", share, False)
    if cluster.spread is not None and (not isinstance(cluster.spread, tuple) or len(cluster.spread) != 2):
        raise ConfigError(f"{where}: spread: got {cluster.spread!r}; takes None, or (least, most)")
    for factor in cluster.spread or ():
        need("spread", factor, False)
    if cluster.flops is None and simulated:
        return
    if not isinstance(cluster.flops, dict) or not cluster.flops or set(cluster.flops) - set(PRECISIONS):
        takes = f"a dict of FLOP/s by {', '.join(PRECISIONS)}"
        raise ConfigError(f"{where}: flops: got {cluster.flops!r}; takes {takes}")
    for precision, rate in cluster.flops.items():
        need(f"flops[{precision!r}]", rate, False)
