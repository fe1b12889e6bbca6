"""Which part of the model a step's time goes to: a profile of the CPU, joined with the compiled program's scopes."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax

# The `jax.named_scope`s of the model and the step. An operation belongs to the innermost that it was traced in.
PARTS = (
    "embedding",
    "attention",
    "moe",
    "router",
    "dispatch",
    "experts",
    "head",
    "gradient_reduction",
    "optimizer",
)
_SCOPE = re.compile(rf"(?<![\w.])({'|'.join(PARTS)})(?![\w.])")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_COLLECTIVE = re.compile(r"\s(all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute)(-start|-done)?\(")
_CONTROL = re.compile(r"\s(while|conditional|call)\(")  # what they contain is timed by itself


def parts_of(hlo: str) -> dict[str, str]:
    """The part to which each instruction of a compiled program's text belongs.

    A collective is `communication`, whatever it is for: most of its time it waits for other devices. What lies in no
    scope is `other`.
    """
    parts = {}
    for line in hlo.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction is None or _CONTROL.search(line):
            continue
        path = re.search(r'op_name="([^"]*)"', line)
        scopes = _SCOPE.findall(path[1]) if path else []
        parts[instruction[1]] = "communication" if _COLLECTIVE.search(line) else scopes[-1] if scopes else "other"
    return parts


def measure(step: Callable[[], object], hlo: str, steps: int = 2) -> dict[str, float]:
    """Share of each part in the time that operations took in `steps` steps, all threads together, the largest first.

    `step` runs the program of which `hlo` is the compiled text, on CPU devices.
    """
    parts, seconds = parts_of(hlo), Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step()
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    for plane in profile.planes:
        for line in plane.lines:  # a thread
            for event in line.events:  # on the CPU an operation's event has its instruction's name
                if event.name in parts:
                    seconds[parts[event.name]] += event.duration_ns
    total = sum(seconds.values())
    return {part: time / total for part, time in seconds.most_common()}
