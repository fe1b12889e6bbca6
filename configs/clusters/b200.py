"""NVIDIA B200 SXM, a node's joined by NVLink, a network adapter of 400 Gb/s per GPU.

Sources: NVIDIA's HGX B200 data sheet, an eighth of it (dense peaks, memory, NVLink's 1.8 TB/s in both directions
together, 1,000 W); NDR InfiniBand, 400 Gb/s. Cores, caches and the memory that a program sees: openxla/xla,
target_config/specs.
"""

from maxsep.config.cluster import Cluster, Gpu


def get_cluster() -> Cluster:
    return Cluster(
        gpu=Gpu(
            name="NVIDIA B200",
            compute_capability=10,
            accelerated_features=True,
            cores=148,
            fpus_per_core=128,
            shared_memory_per_core=233_472,
            shared_memory_per_block=232_448,
            l2_cache=132_644_864,
            clock_ghz=1.965,
        ),
        flops={"bfloat16": 2250e12, "tf32": 1125e12, "float32": 75e12, "float64": 37e12},
        memory_bytes=191_000_000_000,
        memory_bandwidth=7.7e12,
        inside=900e9,
        between=50e9,
        watts=1000,
    )
