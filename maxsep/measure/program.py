"""What a compiled program sends and computes on a device, counted by instruction, loops as often as they run.

`communication.sent` counts what the source asks for; this is what XLA has made of it.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

from maxsep.measure import work
from maxsep.measure.communication import role
from maxsep.measure.hlo import Module

# Share of its operand that a device puts on the wire, among n devices: the least that any algorithm can send. A ring
# does it (Thakur, Rabenseifner, Gropp 2005).
WIRE = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
# Messages that a device sends one after the other, on a ring.
HOPS = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1),
    "all-to-all": lambda n: n - 1,
    "collective-permute": lambda n: 1,
}


@dataclass(frozen=True)
class Sent:
    """What one kind of collective sends for one role, a device and step."""

    role: str
    kind: str
    times: float
    operand_bytes: float
    wire_bytes: float


def sent(module: Module, busy: float = 1) -> list[Sent]:
    """Collectives among several devices, by role and kind, the most bytes first.

    `busy`: share of a pipeline's ticks in which a stage has work.
    """
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0])
    for instruction, times in module.run(busy):
        kind = instruction.collective
        if kind is None or (devices := module.devices(instruction)) == 1:
            continue
        assert times is not None, f"{instruction.name} is in a loop whose length depends on the data"
        size = Counter()
        for operand, path in zip(instruction.operands, instruction.paths, strict=True):
            size[role(path)] += sum(array.bytes for array in module.arrays(operand))
        for of, count in size.items():
            total = totals[of, kind]
            total[0] += times
            total[1] += times * count
            total[2] += times * count * WIRE[kind](devices)
    found = [Sent(*key, *total) for key, total in totals.items()]
    return sorted(found, key=lambda one: -one.operand_bytes)


def by_role(found: list[Sent], wire: bool = False) -> Counter[str]:
    """Operand bytes of each role, or bytes on the wire."""
    out = Counter()
    for one in found:
        out[one.role] += one.wire_bytes if wire else one.operand_bytes
    return out


def products(module: Module, busy: float = 1, filled: float = 1) -> float | None:
    """Floating-point operations of the matrix products, per device and step; `busy`, `filled` as in `schedule.of`.

    None: some depend on the data (dropless experts on a CPU), or a library computes them and nobody has said how many.
    """
    total = 0.0
    for instruction, times in module.run(busy):
        found = work.product(module, instruction, filled)
        if found is None or (found and times is None):
            return None
        total += (times or 0) * found.total()
    return total
