"""What simulated devices share: this machine's cores and memory, measured."""

from dataclasses import replace

from maxsep.config.cluster import Cluster
from maxsep.parallel.start import available_memory


def measured(cluster: Cluster, dtype: str) -> Cluster:
    """A cluster of CPU devices, with each rate that it lacks: a device's share of the whole machine's.

    Devices send by copying: what is sent is read and written.
    """
    from maxsep.measure import bandwidth, flops

    memory = cluster.memory_bandwidth or bandwidth.read() / cluster.devices
    kinds = ("float32", "float64") if dtype == "float64" else ("float32", dtype)
    peaks = cluster.flops or {kind: flops.measured_peak(kind) / cluster.devices for kind in set(kinds)}
    return replace(
        cluster,
        flops=peaks,
        memory_bytes=cluster.memory_bytes or available_memory() / cluster.devices,
        memory_bandwidth=memory,
        inside=cluster.inside or memory / 2,
        between=cluster.between or memory / 2,
    )
