"""This machine's simulated devices, which share its cores and its memory. Every rate is measured here."""

from maxsep.config.cluster import Cluster


def get_cluster() -> Cluster:
    return Cluster(
        gpu=None, flops=None, memory_bytes=None, memory_bandwidth=None, inside=None, between=None, watts=None
    )
