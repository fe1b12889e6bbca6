"""What lies in a device's memory when a compiled program needs the most of it, as the compiler has planned it.

XLA tells the life of every buffer only in files that it dumps: with --xla_dump_to among XLA_FLAGS, or the compiler's
option `xla_dump_to`.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax

from maxsep.measure import hlo, memory

# The kinds of what is neither an argument nor a result.
KINDS = ("gradients", "activations", "communication", "update", "copies", "unused")

_ALLOCATION = re.compile(r"allocation (\d+): size (\d+),(.*):$")
_VALUE = re.compile(r" value: <\d+ (\S+).*? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")


@dataclass(frozen=True)
class Value:
    """An array that a program makes: its instruction, when it is there, and its place in the allocation that it is in.

    `argument`: that of an argument, else None: the memory that the program reserves.
    """

    name: str
    array: hlo.Array
    argument: int | None
    offset: int
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Bytes on a device: of `arguments`, of results that take no argument's place, of constants, and what is reserved.

    `temporaries` is as large as what lies there needs at a time. `values` lie there, or in an argument's place.
    """

    arguments: int
    results: int
    constants: int
    temporaries: int
    values: tuple[Value, ...]

    @property
    def peak(self) -> int:
        return self.arguments + self.results + self.constants + self.temporaries

    @cached_property
    def moment(self) -> int:
        """When the temporaries need the most."""
        moments = sorted({value.first for value in self.values})
        return max(moments, key=lambda moment: sum(own for _, own in self.there(None, moment)), default=0)

    def there(self, argument: int | None, moment: int) -> list[tuple[Value, int]]:
        """What is at once in an argument's place, or in the temporaries', and the bytes that each has for itself."""
        found = [v for v in self.values if v.argument == argument and v.first <= moment <= v.last]
        out, end = [], 0
        # One that begins when another ends may take its place: it is then the one that counts.
        for value in sorted(found, key=lambda value: (value.offset, -value.first)):
            own = max(0, value.offset + value.size - max(value.offset, end))
            end = max(end, value.offset + value.size)
            out.append((value, own))
        return out


def read(folder: Path) -> tuple[hlo.Module, Plan | None] | None:
    """The program compiled last of those dumped in `folder`, and its plan, if that was told; None: no program."""
    texts = sorted(folder.glob("*[_.]after_optimizations.txt"), key=lambda path: path.stat().st_mtime)
    if not texts:
        return None
    module, stem = hlo.parse(texts[-1].read_text()), texts[-1].with_suffix("")
    files = [Path(f"{stem}-{what}.txt") for what in ("buffer-assignment", "live-range")]
    told = all(file.exists() for file in files)
    return module, parse(*(file.read_text() for file in files)) if told else None


def parse(assignment: str, live_ranges: str) -> Plan:
    """XLA's dumped texts as a plan."""
    lives = re.findall(r"^    (\S+):(\d+)-(\d+)$", live_ranges.partition("BufferLiveRange:")[2], re.MULTILINE)
    times = {name: (int(first), int(last)) for name, first, last in lives}
    sizes, values, kind = Counter(), [], None
    for line in assignment.splitlines():
        if header := _ALLOCATION.match(line):
            kind = _kind(header[3])
            sizes[kind] += int(header[2])
            argument = int(header[1]) if kind == "arguments" else None
        elif kind in ("arguments", "temporaries") and (found := _VALUE.match(line)):
            name, size, offset, shape = found.groups()
            # A tuple of its own is a table of addresses: no array that we would know.
            array = (hlo.arrays(shape) or [hlo.Array("token", ())])[0]
            first, last = times.get(name) or times[f"{name}{{}}"]
            values.append(Value(name.partition("{")[0], array, argument, int(offset), int(size), first, last))
    return Plan(*(sizes[kind] for kind in ("arguments", "results", "constants", "temporaries")), tuple(values))


def _kind(words: str) -> str | None:
    """Of an allocation; None: it lies in another memory, as a TPU's on the chip, or in a thread's own."""
    if "color" in words or "thread-local" in words:
        return None
    if " parameter " in words:
        return "arguments"
    if "preallocated-temp" in words:
        return "temporaries"
    return "constants" if "constant" in words else "results"


def by_kind(module: hlo.Module, plan: Plan, state) -> dict[str, int]:
    """Bytes a device when the program needs the most: of its arguments and results, and what `at_peak` tells.

    `state` is the abstract `TrainState`. Arguments are `parameters`, `optimizer` and `batch`, with the step's number
    and the like. `results` take no argument's place, as the step's figures. The sum is `plan.peak`.
    """
    parameters, optimizer = memory.bytes_on_device(state.variables), memory.bytes_on_device(state.optimizer)
    batch = plan.arguments - parameters - optimizer
    weights = {(x.dtype.name, memory.dims_on_device(x)) for x in jax.tree.leaves(state.params)}
    arguments = {"parameters": parameters, "optimizer": optimizer, "batch": batch}
    return arguments | at_peak(module, plan, weights) | {"results": plan.results, "constants": plan.constants}


def at_peak(module: hlo.Module, plan: Plan, weights: set[tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """Bytes a device of each of `KINDS`, when the program needs the most. Their sum is `plan.temporaries`.

    Args:
        module, plan: as `read` gives them.
        weights: type and dimensions of a device's part of each weight. What is made in them outside of the forward
            pass, or in those of one layer of it, is a gradient.

    Returns:
        `gradients`; `communication`, what collectives have received; `update`, the optimizer's work; `copies` that XLA
        makes of arguments; `activations`, all else that the passes keep or work on; `unused`, gaps between them.
    """
    names = {"float32": "f32", "float64": "f64", "bfloat16": "bf16"}
    shapes = {(names[dtype], _significant(some)) for dtype, dims in weights for some in (dims, dims[1:])}
    out = Counter(dict.fromkeys(KINDS, 0))

    def kind(value: Value) -> str:
        made = _origin(module, module.by_name[value.name])
        shape = value.array.dtype, _significant(value.array.dims)
        forward = "jvp(" in made.path and "transpose(" not in made.path
        if made.opcode == "parameter" and made in module.computations[module.entry]:
            return "copies"
        if made.collective:
            return "communication"
        if "/optimizer/" in made.path:
            return "update"
        return "gradients" if shape[1] and shape in shapes and not forward else "activations"

    for value, size in plan.there(None, plan.moment):
        out[kind(value)] += size
    # XLA may copy an argument away and let what takes its place in the end, a weight of the new state, grow there: the
    # sum of gradients. The copy is then the argument.
    for argument in {value.argument for value in plan.values} - {None}:
        for value, size in plan.there(argument, plan.moment):
            if kind(value) not in ("copies", "update"):
                out[kind(value)] += size
                out["copies"] -= size
    out["unused"] = plan.temporaries - out.total()
    return dict(out)


def _origin(module: hlo.Module, instruction: hlo.Instruction) -> hlo.Instruction:
    """The instruction itself, or, of one that only copies or takes apart, that whose result it is."""
    while instruction.opcode in ("copy", "bitcast", "get-tuple-element"):
        instruction = module.made(instruction.operands[0])
    return instruction


def _significant(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Without sizes of 1, in order: XLA turns arrays as it needs them."""
    return tuple(sorted(dim for dim in dims if dim > 1))
