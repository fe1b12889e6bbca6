"""A compiled program as the work of its steps, in the order in which a device runs them; without times.

XLA has scheduled it: kernels run one after the other, and beside them what has been started and is waited for later.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from maxsep.measure import work
from maxsep.measure.communication import role
from maxsep.measure.hlo import Instruction, Module
from maxsep.measure.parts import part_of
from maxsep.parallel.rounds import further


@dataclass(frozen=True)
class Kernel:
    flops: dict[str, float]  # of its matrix products, by type as `work.product` tells them
    moved: int  # bytes read from memory and written to it


@dataclass(frozen=True)
class Collective:
    kind: str
    roles: dict[str, float]  # the share of each in the bytes, as XLA joins collectives of several
    size: int  # bytes of its operands
    groups: int  # a row of `Schedule.groups`
    name: str | None  # that of the `Wait` for it; None: it is waited for at once


@dataclass(frozen=True)
class Wait:
    """For the collective `name`."""

    name: str


@dataclass(frozen=True)
class Loop:
    trips: int
    body: tuple["Step", ...]


@dataclass(frozen=True)
class Branches:
    """A pipeline's conditional: one branch is a stage's work, the other does nothing."""

    branches: tuple[tuple["Step", ...], ...]


Step = Kernel | Collective | Wait | Loop | Branches


@dataclass(frozen=True)
class Schedule:
    """What a program does in one call on each of its devices.

    Args:
        steps: in order.
        groups: the partitions among which collectives send, a row each.
        busy: share of a pipeline's ticks in which a stage has work.
        unknown: what is not counted, by name, and how often it stands in the program: calls of libraries whose products
            nobody has said, loops whose length depends on the data (counted as one turn, further rounds as none).
    """

    steps: tuple[Step, ...]
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    busy: float
    unknown: dict[str, int]

    def flops(self) -> Counter[str]:
        """Of the matrix products of one device, on average over a pipeline's stages; by type."""

        def of(steps: tuple[Step, ...]) -> Counter[str]:
            total: Counter[str] = Counter()
            for step in steps:
                match step:
                    case Kernel():
                        total.update(step.flops)
                    case Loop():
                        total.update({kind: step.trips * count for kind, count in of(step.body).items()})
                    case Branches():
                        longest = max((of(branch) for branch in step.branches), key=Counter.total)
                        total.update({kind: self.busy * count for kind, count in longest.items()})
            return total

        return of(self.steps)


KINDS = {kind.__name__: kind for kind in (Kernel, Collective, Wait, Loop, Branches, Schedule)}


def of(module: Module, busy: float = 1, filled: float = 1, used: float | None = None) -> Schedule:
    """The schedule of a compiled program.

    Args:
        module: the program.
        busy: share of a pipeline's ticks in which a stage has work.
        filled: share of a grouped product's rows that there are at a balanced load.
        used: matrices of a grouped product that have rows; None: all.
    """
    groups: dict[tuple, int] = {}
    unknown: Counter[str] = Counter()
    pending: set[str] = set()
    fused = _fused(module)

    def steps(name: str) -> tuple[Step, ...]:
        return tuple(step for instruction in module.computations[name] for step in made(instruction))

    def made(i: Instruction) -> Iterator[Step]:
        if i.opcode == "while" and further(i.path):
            unknown[f"a loop of further rounds, in {part_of(i.path)}"] += 1
        elif i.opcode == "while":
            trips = module.trips(i)
            if trips is None:
                unknown[f"a loop whose length depends on the data, in {part_of(i.path)}"] += 1
            yield Loop(1 if trips is None else trips, steps(i.body))
        elif i.opcode == "conditional":
            yield Branches(tuple(map(steps, i.called)))
        elif i.opcode == "call":
            yield from steps(i.called[0])
        elif module.started(i).collective:
            if module.devices(module.started(i)) > 1:
                yield collective(module.started(i), i)
        elif i.name in fused:
            name, starts = fused[i.name]
            if starts:
                yield collective(starts, i, name)
            else:
                yield Wait(name)
        elif i.opcode.endswith("-done") and i.operands[0] in pending:
            yield Wait(i.operands[0])
        elif i.opcode not in work.FREE and not i.opcode.endswith(("-done", "-update")):
            kernel = module.started(i)
            if work.product(module, kernel) is None:
                unknown[kernel.target] += 1
            yield Kernel(dict(work.flops(module, kernel, filled)), work.moved(module, kernel, used))

    def collective(i: Instruction, start: Instruction, name: str | None = None) -> Collective:
        """Of the collective `i` that `start` starts; `name`: that of the `Wait` for it, where XLA has fused both."""
        sizes: Counter[str] = Counter()
        for operand, path in zip(i.operands, i.paths, strict=True):
            sizes[role(path)] += sum(array.bytes for array in module.arrays(operand))
        total, among = sizes.total(), tuple(map(tuple, module.groups(i)))
        shares = {of: size / max(total, 1) for of, size in sizes.items()}
        later = start.opcode.endswith("-start") and not start.synchronous
        if later:
            pending.add(start.name)
        number = groups.setdefault(among, len(groups))
        return Collective(i.collective, shares, total, number, start.name if later else name)

    return Schedule(steps(module.entry), tuple(groups), busy, dict(unknown))


def _fused(module: Module) -> dict[str, tuple[str, Instruction | None]]:
    """For TPUs, XLA fuses the start and the end of a collective with other work, and repeats it in what runs beside it.

    Returns:
        by the fusion that starts or ends one: the name of what it starts, and the collective, None where it ends.
    """
    found, started = {}, {}
    for i in module.by_name.values():
        if i.opcode != "fusion":
            continue
        inside = module.within(i.called[0])
        sends = next((j for j in inside if j.collective), None)
        targets = {j.target for j in inside}
        if sends is None or not targets & {"AsyncCollectiveStart", "AsyncCollectiveDone"}:
            continue
        chain = re.search(r'chain_id="(\w+)"', sends.attributes)[1]
        if "AsyncCollectiveStart" in targets:
            started[chain] = i.name
            found[i.name] = i.name, sends
        else:
            found[i.name] = started[chain], None
    return found


def to_json(part: Any) -> Any:
    """A schedule, or a part of it, as dicts and lists; what was a dataclass tells its kind."""
    match part:
        case dict():
            return {name: to_json(value) for name, value in part.items()}
        case tuple():
            return [to_json(value) for value in part]
        case _ if dataclasses.is_dataclass(part):
            return {"is": type(part).__name__} | {name: to_json(value) for name, value in vars(part).items()}
    return part


def from_json(part: Any) -> Any:
    """The inverse of `to_json`, also after a way through text."""
    match part:
        case {"is": kind, **values}:
            return KINDS[kind](**{name: from_json(value) for name, value in values.items()})
        case dict():
            return {name: from_json(value) for name, value in part.items()}
        case list():
            return tuple(map(from_json, part))
    return part
