"""What a collective puts on the links of a cluster: those inside a node, and those between nodes."""

from collections.abc import Sequence
from dataclasses import dataclass

from maxsep.config.cluster import Cluster
from maxsep.measure.program import HOPS, WIRE


@dataclass(frozen=True)
class Load:
    """Bytes that one device sends, over each kind of link, in so many messages one after the other."""

    inside: float
    between: float
    hops: int

    def seconds(self, cluster: Cluster) -> tuple[float, float]:
        """On the links inside a node, and on those between nodes; without latencies."""
        return self.inside / cluster.inside, self.between / cluster.between


def load(kind: str, size: float, groups: Sequence[Sequence[int]], nodes: Sequence[int]) -> Load:
    """The load of a collective of `kind`, of the busiest device.

    Rings, the least that any algorithm can send (`WIRE`). A ring that crosses nodes goes out of each of them once, and
    the devices there share its way out; what stays inside goes from one to the next.

    Args:
        kind: one of `hlo.COLLECTIVES`.
        size: bytes of its operand.
        groups: the partitions of each group, all of one size; of a permutation the pairs.
        nodes: the node of each partition.
    """
    crossed = max(len({nodes[partition] for partition in group}) for group in groups)
    if kind == "collective-permute":
        return Load(size, 0, 1) if crossed == 1 else Load(0, size, 1)
    devices = max(map(len, groups))
    near, hops = devices / crossed, HOPS[kind](devices)  # devices of a group in a node
    if kind == "all-to-all":
        return Load(size * (near - 1) / devices, size * (devices - near) / devices, hops)
    ring = size * WIRE[kind](devices)
    return Load(ring if near > 1 else 0, ring / near if crossed > 1 else 0, hops)
