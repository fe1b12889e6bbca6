"""NVIDIA H200 SXM 141 GB: an H100 with more and faster memory.

Sources: NVIDIA's H200 data sheet (4.8 TB/s, 700 W; all else as the H100's); NDR InfiniBand, 400 Gb/s. The cache and the
memory that a program sees: openxla/xla, target_config/specs.
"""

from dataclasses import replace

from configs.clusters import h100
from maxsep.config.cluster import Cluster


def get_cluster() -> Cluster:
    cluster = h100.get_cluster()
    gpu = replace(cluster.gpu, name="NVIDIA H200", l2_cache=62_914_560)
    return replace(cluster, gpu=gpu, memory_bytes=150_000_000_000, memory_bandwidth=4.8e12)
