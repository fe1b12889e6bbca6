"""NVIDIA H100 SXM 80 GB, a node's joined by NVLink, a network adapter of 400 Gb/s per GPU.

Sources: NVIDIA's H100 data sheet (dense peaks, memory, NVLink's 900 GB/s in both directions together, 700 W); NDR
InfiniBand, 400 Gb/s. Cores, caches and the memory that a program sees: openxla/xla, target_config/specs.
"""

from maxsep.config.cluster import Cluster, Gpu


def get_cluster() -> Cluster:
    return Cluster(
        gpu=Gpu(
            name="NVIDIA H100 80GB HBM3",
            compute_capability=9,
            accelerated_features=True,
            cores=132,
            fpus_per_core=128,
            shared_memory_per_core=233_472,
            shared_memory_per_block=232_448,
            l2_cache=52_428_800,
            clock_ghz=1.98,
        ),
        flops={"bfloat16": 989.4e12, "tf32": 494.7e12, "float32": 67e12, "float64": 67e12},
        memory_bytes=84_942_979_072,
        memory_bandwidth=3.35232e12,
        inside=450e9,
        between=50e9,
        watts=700,
    )
