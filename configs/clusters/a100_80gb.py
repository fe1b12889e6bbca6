"""NVIDIA A100 SXM 80 GB, a node's joined by NVLink, a network adapter of 200 Gb/s per GPU.

Sources: NVIDIA's A100 data sheet (dense peaks, memory, NVLink's 600 GB/s in both directions together, 400 W); HDR
InfiniBand, 200 Gb/s. Cores, caches and the memory that a program sees: openxla/xla, target_config/specs.
"""

from maxsep.config.cluster import Cluster, Gpu


def get_cluster() -> Cluster:
    return Cluster(
        gpu=Gpu(
            name="NVIDIA A100-SXM4-80GB",
            compute_capability=8,
            accelerated_features=False,
            cores=108,
            fpus_per_core=64,
            shared_memory_per_core=167_936,
            shared_memory_per_block=166_912,
            l2_cache=41_943_040,
            clock_ghz=1.41,
        ),
        flops={"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12, "float64": 19.5e12},
        memory_bytes=85_100_068_864,
        memory_bandwidth=2.03904e12,
        inside=300e9,
        between=25e9,
        watts=400,
    )
