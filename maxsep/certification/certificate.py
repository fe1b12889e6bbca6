"""The certificate: a verdict, what was compared with what, and what was not; for people and for programs."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxsep.certification.check import Check, worst_of
from maxsep.certification.parts import PARTS, Found
from maxsep.certification.scaled import changed
from maxsep.config import Config, MeshConfig, runs, segments
from maxsep.measure.report import columns
from maxsep.output.durable import json_text, write_text

FAILED = 1  # exit status: a check has failed, or a planted fault was not seen
PACKAGES = ("maxsep", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
NEVER = (
    "widths, vocabulary, lengths and batches other than these",
    "data: the records are random ids",
    "that training converges: ten steps are compared, not a run",
)


@dataclass(frozen=True)
class Certificate:
    """What was certified, and what came of it."""

    config: Config  # the user's
    small: Config  # that which ran
    found: Found

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.found.checks)

    @property
    def worst(self) -> str:
        """The check that is furthest from its tolerance, in words."""
        check = worst_of(self.found.checks)
        where = " ".join(filter(None, (check.part, check.run)))
        return f"{where}: {check.quantity} differs by {check.difference:.1e} at {check.worst}"

    @property
    def parts(self) -> list[str]:
        """Those that have checks, in the order of the table."""
        return [part for part in PARTS if any(check.part == part for check in self.found.checks)]

    def to_json(self) -> dict[str, Any]:
        """`passed`, `checks`, `changed`, `versions`, `devices`, `not_certified`, and the `hash` of all of it."""
        made = {
            "passed": self.passed,
            "config": dataclasses.asdict(self.config),
            "changed": {path: list(values) for path, values in changed(self.config, self.small).items()},
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
            "devices": self.found.devices,
            "notes": self.found.notes,
            "not_certified": self.found.left,  # here
            "never_certified": NEVER,
            "checks": [self._of(check) for check in self.found.checks],
        }
        return made | {"hash": hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()}

    def _of(self, check: Check) -> dict[str, Any]:
        model, layout, mesh = self.small.model, None, None
        if check.run:
            layout, of_run = runs.parse(check.run, self.config.mesh)
            mesh = of_run.sizes
        return {
            "part": check.part,
            "layout": layout,
            "mesh": mesh,
            "dispatch": "dropless" if model.capacity_factor is None else f"capacity {model.capacity_factor}",
            "quantity": check.quantity,
            "largest_relative_difference": check.difference,
            "tolerance": check.tolerance,
            "worst": check.worst,
            "passed": check.passed,
        }

    def text(self) -> list[str]:
        """The lines of certificate.md: the verdict first."""
        verdict = "passed" if self.passed else f"NOT passed: {self.worst}"
        model, train = self.small.model, self.small.train
        facts = self.to_json()
        of = f"{segments.described(model)}, {model.heads} heads, top {model.top_k}"
        micro = "1 micro-batch" if train.accumulation == 1 else f"{train.accumulation} micro-batches"
        batch = f"{train.batch_size} sequences in {micro}"
        return [
            f"{self.config.name}: {verdict}",
            "",
            f"Certified with a small copy of the model: {of}; {batch}.",
            *(line for part in self.parts for line in ("", *self._section(part))),
            "",
            *self.found.notes,
            *([""] if self.found.notes else []),
            "Changed for the certificate, from and to:",
            *(f"  {path}: {old} -> {new}" for path, (old, new) in changed(self.config, self.small).items()),
            "",
            "Not certified:",
            *(f"  {part}: not asked for" for part in PARTS if part not in self.found.devices),
            *(f"  {what}" for what in (*self.found.left, *NEVER)),
            "",
            f"{', '.join(f'{name} {version}' for name, version in facts['versions'].items())}; sha256 {facts['hash']}",
        ]

    def _section(self, part: str) -> Iterator[str]:
        """A part's table: quantities by run, each the largest relative difference."""
        checks = [check for check in self.found.checks if check.part == part]
        of = {(check.run, check.quantity): check for check in checks}
        names, quantities = (list(dict.fromkeys(key[at] for key in of)) for at in (0, 1))
        bounded = len(bounds := {check.tolerance for check in checks}) > 1
        most = "each with its bound" if bounded else f"at most {_number(*bounds)}"
        yield f"{part}: {PARTS[part]}; {most}. On {self.found.devices[part]}."
        yield ""
        cells = [(quantity, *(_cell(of.get((name, quantity)), bounded) for name in names)) for quantity in quantities]
        yield from columns([("largest relative difference", *(name or "one device" for name in names)), *cells])

    @classmethod
    def read(cls, folder: Path) -> Found:
        """What a certificate says that `write` has written."""
        facts = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))

        def check(of: dict[str, Any]) -> Check:
            run = of["layout"] and runs.name(of["layout"], MeshConfig(**of["mesh"]))
            found = of["largest_relative_difference"]
            difference = float("inf") if found is None else found  # JSON has none
            return Check(of["part"], run or "", of["quantity"], difference, of["worst"], of["tolerance"])

        return Found([check(of) for of in facts["checks"]], facts["notes"], facts["not_certified"], facts["devices"])

    def write(self, folder: Path) -> None:
        """Writes both files.

        Raises:
            OSError: the folder cannot be written.
        """
        first, *rest = self.text()
        write_text(folder / "certificate.md", "\n".join([f"# {first}", "", "```", *rest[1:], "```", ""]))
        write_text(folder / "certificate.json", json_text(self.to_json()))


def _cell(check: Check | None, bounded: bool) -> str:
    if check is None:
        return ""
    bound = f" of {_number(check.tolerance)}" if bounded else ""
    return f"{_number(check.difference)}{bound}" + ("" if check.passed else " FAILED")


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"
