"""A compiled program's text as instructions: XLA's optimised HLO, in the order in which it runs."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from maxsep.parallel.rounds import further

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {"pred": 1, "token": 0, "c64": 8, "c128": 16}  # of an element; of other types their name says the bits

_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_ON_CHIP = re.compile(r":T\(.*S\(1\)")  # in a TPU's layout: its vector memory
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # 0, 1, ... in these dimensions, transposed
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")


@dataclass(frozen=True)
class Array:
    """One of the arrays that an instruction makes."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False  # in a memory of its own beside the device's

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        if self.dtype in BYTES:
            return self.elements * BYTES[self.dtype]
        bits = int(re.search(r"\d+", self.dtype)[0])  # of f32, bf16, s8, f8e4m3fn, u4
        return -(-self.elements * bits // 8)


@dataclass(frozen=True)
class Instruction:
    """A line of the text.

    `operands`: names, of one element of a tuple with #number; `called`: other computations; `body`: that of a loop;
    `attributes`: as they are written; `root`: its result is its computation's.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    body: str | None
    attributes: str
    root: bool

    @cached_property
    def arrays(self) -> list[Array]:
        """What it makes."""
        return arrays(self.shape)

    @property
    def path(self) -> str:
        """The functions and scopes in which it was traced; "" where XLA does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def paths(self) -> list[str]:
        """`path` for each operand: XLA joins collectives of several scopes to one, whose path lists theirs."""
        listed = re.fullmatch(r"(.*?/)\((.*:.*)\)", self.path)
        own = [listed[1] + path for path in listed[2].split(":")] if listed else []
        return own if len(own) == len(self.operands) else [self.path] * len(self.operands)

    @property
    def collective(self) -> str | None:
        """Which of `COLLECTIVES` it is, or starts; None: none."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def synchronous(self) -> bool:
        """Of what starts a collective: nothing runs beside it, as XLA says in its configuration."""
        return '"is_sync":true' in self.attributes

    @property
    def target(self) -> str | None:
        """The library's function that a custom call is for; None: it is no custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found and self.opcode == "custom-call" else None


@dataclass(frozen=True)
class Module:
    """Instructions of each computation, by name; `entry` is where the program begins, on `partitions` devices."""

    computations: dict[str, list[Instruction]]
    entry: str
    partitions: int

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Every instruction; their names differ."""
        return {i.name: i for instructions in self.computations.values() for i in instructions}

    def made(self, operand: str) -> Instruction:
        """The instruction that makes an operand."""
        return self.by_name[operand.partition("#")[0]]

    def arrays(self, operand: str) -> list[Array]:
        """What an operand is: the arrays of a whole tuple, or of its element."""
        found, element = self.made(operand).arrays, operand.partition("#")[2]
        return [found[int(element)]] if element else found

    def within(self, name: str) -> list[Instruction]:
        """Instructions of a computation and of all that it calls."""
        out = []
        for instruction in self.computations[name]:
            out += [instruction, *(i for called in instruction.called for i in self.within(called))]
        return out

    def run(self, busy: float = 1) -> Iterator[tuple[Instruction, float | None]]:
        """Every instruction, and how often it runs on a device; None where that depends on the data.

        A conditional's branches count `busy` times each: a pipeline's, of which one does nothing.
        """
        yield from self._run(self.entry, 1, busy)

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs; None where that depends on the data. Of further rounds (`in_rounds`): 0, as usual.

        XLA records the length, except for TPUs. There, a JAX loop of known length still counts from 0 to a constant.
        """
        if further(loop.path):
            return 0
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        test = self.root(re.search(r"condition=%?([\w.-]+)", loop.attributes)[1])
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, end = map(self.made, test.operands)
        if counter.opcode != "parameter" or end.opcode != "constant":
            return None
        return int(re.match(r"\d+", end.attributes)[0])

    def _run(self, name: str, times: float | None, busy: float) -> Iterator[tuple[Instruction, float | None]]:
        for instruction in self.computations[name]:
            yield instruction, times
            inner = times
            if instruction.opcode == "while":
                trips = self.trips(instruction)
                inner = times * (trips or 0) if times == 0 or None not in (times, trips) else None
            elif instruction.opcode == "conditional" and times is not None:
                inner = times * busy
            for called in instruction.called:
                yield from self._run(called, inner, busy)

    def root(self, name: str) -> Instruction:
        """The instruction whose result is that of a computation."""
        return next(i for i in self.computations[name] if i.root)

    def started(self, instruction: Instruction) -> Instruction:
        """What an `async-start` starts; else itself. XLA also writes the two as one, as `all-to-all-start`."""
        return self.root(instruction.called[0]) if instruction.opcode == "async-start" else instruction

    def devices(self, collective: Instruction) -> int:
        """Devices among which a collective sends, the largest group's; 1: it sends nothing."""
        return max(map(len, self.groups(collective)), default=1)

    def groups(self, collective: Instruction) -> list[list[int]]:
        """The partitions of each group among which a collective sends; of a permutation the pairs that differ."""
        text = collective.attributes
        if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
            return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if a != b]
        if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text):
            return _of_mesh(*mesh.groups())
        if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", text):
            return _iota(*iota.groups()[1:]).reshape(_ints(iota[1])).tolist()
        listed = re.search(r"replica_groups=\{((?:\{[\d,]+\},?)*)\}", text)
        return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])] or [list(range(self.partitions))]


def parse(text: str) -> Module:
    """HLO text as a module; what conditionals call are their branches."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = found.groups()
            called = re.findall(r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.-]+)", rest)
            called += re.findall(r"%?([\w.-]+)", (re.search(r"branch_computations=\{(.*?)\}", rest) or ["", ""])[1])
            body = re.search(r"body=%?([\w.-]+)", rest)
            operands = re.findall(r"%([\w.#-]+)", _arguments(rest))
            made = Instruction(name, shape, opcode, tuple(operands), tuple(called), body and body[1], rest, bool(root))
            current.append(made)
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def arrays(shape: str) -> list[Array]:
    """The arrays of a written shape, of a tuple all."""
    return [
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), bool(_ON_CHIP.search(layout)))
        for dtype, dims, layout in _ARRAY.findall(shape)
    ]


def _arguments(rest: str) -> str:
    """What stands before the parenthesis that closes the operands."""
    depth = 1
    for at, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:at]
    return rest


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    dims = _ints(dims)
    return np.arange(math.prod(dims)).reshape(dims).transpose(_ints(order) if order else None)


def _of_mesh(axes: str, ids: str | None, among: str) -> list[list[int]]:
    """The groups of `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(1)2}`: a part of 2 of axis b, 1 before it."""
    used = {name: (before, part) for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", among)}
    dims, own = [], []
    for name, size in re.findall(r"'(\w+)'=(\d+)", axes):
        before, part = used.get(name) or ("", "")
        before, part = (int(before), int(part)) if part else (1, int(size))
        dims += [before, part, int(size) // (before * part)]
        own += [False, name in used, False]
    devices = _iota(*re.search(_IOTA, ids).groups()) if ids else np.arange(math.prod(dims))
    order = sorted(range(len(dims)), key=own.__getitem__)  # what the groups are made of comes last
    size = math.prod(dim for dim, inside in zip(dims, own, strict=True) if inside)
    return devices.reshape(dims).transpose(order).reshape(-1, size).tolist()
