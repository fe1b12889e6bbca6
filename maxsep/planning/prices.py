"""What a schedule costs on a cluster: a roofline.

A kernel takes what its matrix products take at the device's peak, or its bytes at the memory's bandwidth, whichever is
longer (Williams, Waterman, Patterson 2009). Kernels run one after the other, collectives one after the other beside
them. Of a collective that has been started, what has not ended when it is waited for is exposed; of one that nothing
runs beside, all is. Of a cluster that has been measured, each rate counts by the share of it that programs reach, and a
collective takes a latency per message beside its bytes.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from maxsep.config.cluster import RATES, Cluster
from maxsep.measure.schedule import Branches, Collective, Kernel, Loop, Schedule, Step, Wait
from maxsep.planning.links import Load, load


@dataclass
class Sent:
    """What collectives of one kind send for one role, per device and step: bytes of operands, and on each link."""

    times: float = 0
    operand_bytes: float = 0
    inside_bytes: float = 0
    between_bytes: float = 0
    inside_seconds: float = 0
    between_seconds: float = 0
    exposed_seconds: float = 0


@dataclass
class Cost:
    """Seconds of a step. What is `exposed` of the collectives, products and memory-bound work add up to the step.

    `memory`: what kernels wait for their bytes beyond their products. `sent`: by role, kind, and whether it is started
    ahead.
    """

    step: float = 0
    products: float = 0
    memory: float = 0
    sent: dict[tuple[str, str, bool], Sent] = field(default_factory=lambda: defaultdict(Sent))

    @property
    def exposed(self) -> float:
        return self.step - self.products - self.memory

    def total(self, name: str) -> float:
        """A field of `Sent`, over all collectives."""
        return sum(getattr(one, name) for one in self.sent.values())


class UnknownRateError(ValueError):
    """The cluster says no rate for products of this type."""


def rate(cluster: Cluster, kind: str) -> float:
    """FLOP/s of one device in products of the HLO type `kind`, as `work.product` names it.

    float32 is what XLA makes of it by default: TF32 where the device has that.

    Raises:
        UnknownRateError: the cluster has none.
    """
    names = {
        "bf16": ("bfloat16",),
        "bf16 highest": ("bfloat16",),
        "f16": ("bfloat16",),
        "f32": ("tf32", "float32"),
        "f32 highest": ("float32",),
        "f64": ("float64",),
        "f64 highest": ("float64",),
    }.get(kind, ())
    for name in names:
        if name in cluster.flops:
            return cluster.flops[name]
    raise UnknownRateError(f"flops: the cluster has no rate for products of {kind}")


def price(schedule: Schedule, cluster: Cluster, nodes: Sequence[int]) -> Cost:
    """The cost of a step on a cluster.

    Args:
        schedule: what the program does on each device.
        cluster: rates.
        nodes: the node of each partition of the program.
    """
    cost = Cost()
    reached = cluster.reached or dict.fromkeys(RATES, 1.0)
    bandwidth = cluster.memory_bandwidth * reached["memory"]

    @cache
    def unit(kind: str, groups: int) -> Load:
        return load(kind, 1, schedule.groups[groups], nodes)

    def seconds(steps: Sequence[Step], times: float, own: float) -> float:
        """Of one run. `times` runs are booked as time, `own` as what one device does: less, where others are busy."""
        now = link = 0.0
        under_way: dict[str, tuple[float, list[tuple[Sent, float]]]] = {}
        for step in steps:
            match step:
                case Kernel():
                    products = sum(count / rate(cluster, kind) for kind, count in step.flops.items())
                    products /= reached["products"]
                    waiting = max(0.0, step.moved / bandwidth - products)
                    cost.products += times * products
                    cost.memory += times * waiting
                    now += products + waiting
                case Loop():
                    now += step.trips * seconds(step.body, times * step.trips, own * step.trips)
                case Branches():  # at each tick of a pipeline some stage is busy, and all wait for it
                    taken = [seconds(branch, 0, 0) for branch in step.branches]
                    longest = taken.index(max(taken))
                    now += taken[longest]
                    seconds(step.branches[longest], times, own * schedule.busy)
                case Collective():
                    duration, rows = booked(step, times, own)
                    link = max(link, now) + duration
                    if step.name is None:
                        expose(rows, times * (link - now))
                        now = link
                    else:
                        under_way[step.name] = link, rows
                case Wait():
                    end, rows = under_way.pop(step.name)
                    expose(rows, times * max(0.0, end - now))
                    now = max(now, end)
        return max(now, link)

    def booked(step: Collective, times: float, own: float) -> tuple[float, list[tuple[Sent, float]]]:
        """Seconds of one, and the rows of its roles with their shares."""
        of_a_byte = unit(step.kind, step.groups)
        inside, between = (step.size * one / reached["links"] for one in of_a_byte.seconds(cluster))
        rows = []
        for role, share in step.roles.items():
            row = cost.sent[role, step.kind, step.name is not None]
            row.times += own
            row.operand_bytes += own * share * step.size
            row.inside_bytes += own * share * step.size * of_a_byte.inside
            row.between_bytes += own * share * step.size * of_a_byte.between
            row.inside_seconds += times * share * inside
            row.between_seconds += times * share * between
            rows.append((row, share))
        return inside + between + of_a_byte.hops * cluster.latency, rows

    def expose(rows: list[tuple[Sent, float]], time: float) -> None:
        for row, share in rows:
            row.exposed_seconds += share * time

    cost.step = seconds(schedule.steps, 1.0, 1.0)
    return cost
