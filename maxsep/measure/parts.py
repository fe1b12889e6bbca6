"""Which part of the model a step's time goes to: a profile of the CPU, joined with the compiled program's scopes."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax

from maxsep.measure import hlo
from maxsep.measure.communication import role

# The `jax.named_scope`s of the model and the step. An operation belongs to the innermost that it was traced in.
PARTS = (
    "embedding",
    "attention",
    "dense",
    "moe",
    "router",
    "dispatch",
    "experts",
    "head",
    "gradient_reduction",
    "optimizer",
)
COMMUNICATION = "communication: "  # before the role of what is sent
_SCOPE = re.compile(rf"(?<![\w.])({'|'.join(PARTS)})(?![\w.])")
_CONTROL = ("while", "conditional", "call")  # what they contain is timed by itself


def parts_of(module: hlo.Module) -> dict[str, str]:
    """The part to which each instruction of a compiled program belongs.

    A collective is `communication: ` and its role, not the part it serves: most of its time it waits for other devices.
    What lies in no scope is `other`.
    """

    def part(instruction: hlo.Instruction) -> str:
        if instruction.collective:
            return COMMUNICATION + role((instruction.paths or [instruction.path])[0])
        return part_of(instruction.path)

    return {name: part(one) for name, one in module.by_name.items() if one.opcode not in _CONTROL}


def part_of(path: str) -> str:
    """The innermost of `PARTS` among the scopes of a path; `other` where there is none."""
    scopes = _SCOPE.findall(path)
    return scopes[-1] if scopes else "other"


def measure(step: Callable[[], object], module: hlo.Module, steps: int = 2) -> dict[str, float]:
    """Share of each part in the time that operations took in `steps` steps, all threads together, the largest first.

    `step` runs the program `module` on CPU devices.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step()
        return shares(Path(folder), module)


def shares(folder: Path, module: hlo.Module) -> dict[str, float]:
    """The same of the profile in `folder`, of a run of `module` on CPU devices; {} where there is none of it."""
    parts, seconds = parts_of(module), Counter()
    for path in sorted(folder.rglob("*.xplane.pb"))[-1:]:
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:  # a thread
                for event in line.events:  # on the CPU an operation's event has its instruction's name
                    if event.name in parts:
                        seconds[parts[event.name]] += event.duration_ns
    return {part: time / seconds.total() for part, time in seconds.most_common()}
