"""Google's TPU v6e, a slice of up to 256 chips, a torus of two dimensions.

Sources: Google Cloud's pages of the generation (dense bfloat16 peak, memory, its bandwidth); Austin et al., How to
Scale Your Model (2025), for a link of the torus, of which a ring uses both directions. Products of float32 are made of
bfloat16 ones: six of them where they are exact, three as tensorfloat32. Memory is what XLA has for programs.
"""

from maxsep.config.cluster import Cluster, Tpu

PEAK = 918e12


def get_cluster() -> Cluster:
    return Cluster(
        gpu=None,
        tpu=Tpu(
            name="v6e",
            kind="TPU v6 lite",
            slices={1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
        ),
        flops={"bfloat16": PEAK, "tf32": PEAK / 3, "float32": PEAK / 6},
        memory_bytes=33_547_091_968,
        memory_bandwidth=1640e9,
        inside=180e9,
        between=180e9,  # there is no other node
        watts=None,
    )
