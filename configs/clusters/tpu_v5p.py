"""Google's TPU v5p, a slice, a torus of three dimensions.

Sources: Google Cloud's pages of the generation (dense bfloat16 peak, memory, its bandwidth); Austin et al., How to
Scale Your Model (2025), for a link of the torus, of which a ring uses both directions. Products of float32 are made of
bfloat16 ones: six of them where they are exact, three as tensorfloat32. Memory is what XLA has for programs.
"""

from maxsep.config.cluster import Cluster, Tpu

PEAK = 459e12


def get_cluster() -> Cluster:
    return Cluster(
        gpu=None,
        tpu=Tpu(
            name="v5p",
            kind="TPU v5",
            slices={
                4: "2x2x1",
                8: "2x2x2",
                16: "2x2x4",
                32: "2x4x4",
                64: "4x4x4",
                128: "4x4x8",
                256: "4x8x8",
                512: "8x8x8",
            },
        ),
        flops={"bfloat16": PEAK, "tf32": PEAK / 3, "float32": PEAK / 6},
        memory_bytes=102_803_439_616,
        memory_bandwidth=2765e9,
        inside=180e9,
        between=180e9,  # there is no other node
        watts=None,
    )
