"""The certificate: a verdict, what was compared with what, and what was not; for people and for programs."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxsep.certification.evidence import STEPS, TOLERANCE, Check
from maxsep.certification.scaled import changed
from maxsep.config import Config, ConfigError, runs, segments
from maxsep.measure.report import columns
from maxsep.output.durable import json_text, write_text
from maxsep.parallel.start import settle

FAILED = 1  # exit status: a check has failed, or a planted fault was not seen
PACKAGES = ("maxsep", "jax", "jaxlib", "flax", "optax", "numpy")
NOT_CERTIFIED = (
    "the run's own type: all was computed in float64",
    "kernels of accelerators: all ran on simulated devices of the CPU",
    "several processes, checkpoints, data",
    "widths, vocabulary, lengths and batches beyond those that were certified",
)


def certified(configs: Sequence[Config], say: Callable[[str], None]) -> list[Check]:
    """Every check of the configs, which differ in layout and mesh alone, on simulated devices.

    Starts JAX, which must not have been started before.
    """
    start(configs)
    from maxsep.certification import evidence

    began = time.monotonic()
    reference, checks = evidence.gather(evidence.alone(configs[0])), []
    say(f"one device: {time.monotonic() - began:.0f} s")
    for config in configs:
        began, name = time.monotonic(), runs.name(config.layout, config.mesh)
        found = list(evidence.compared(name, evidence.gather(config, reference["start"]), reference))
        worst = max(found, key=lambda check: check.difference)
        say(f"{name}: {worst.difference:.1e} in {worst.quantity}, {time.monotonic() - began:.0f} s")
        checks += found
    return checks


def start(configs: Sequence[Config]) -> None:
    """Starts JAX on as many simulated devices as the largest mesh has."""
    os.environ.pop("JAX_NUM_CPU_DEVICES", None)
    settle(configs[0], max(config.mesh.devices for config in configs))


@dataclass(frozen=True)
class Certificate:
    """What was certified, and what came of it."""

    config: Config  # the user's
    small: Config  # that which ran
    checks: list[Check]
    left: tuple[str, ...] = ()  # layouts that the config does not allow, in words

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def worst(self) -> str:
        """The check that is furthest from its tolerance, in words."""
        check = max(self.checks, key=lambda check: check.difference / check.tolerance)
        return f"{check.run}: {check.quantity} differs by {check.difference:.1e} at {check.worst}"

    def to_json(self) -> dict[str, Any]:
        """`passed`, `checks`, `changed`, `versions`, `not_certified`, and the `hash` of all of it."""
        made = {
            "passed": self.passed,
            "config": dataclasses.asdict(self.config),
            "changed": {path: list(values) for path, values in changed(self.config, self.small).items()},
            "steps": STEPS,
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
            "devices": "simulated, of a CPU",
            "not_certified": [*self.left, *NOT_CERTIFIED],
            "checks": [dataclasses.asdict(check) | {"passed": check.passed} for check in self.checks],
        }
        return made | {"hash": hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()}

    def text(self) -> list[str]:
        """The lines of certificate.md: the verdict first."""
        names = list(dict.fromkeys(check.run for check in self.checks))
        of = {(check.run, check.quantity): check for check in self.checks}
        quantities = list(dict.fromkeys(check.quantity for check in self.checks))
        verdict = "passed" if self.passed else f"NOT passed: {self.worst}"
        head = ("largest relative difference", *names)
        cells = [(quantity, *(_cell(of[name, quantity]) for name in names)) for quantity in quantities]
        model, train = self.small.model, self.small.train
        what = f"{segments.described(model)}, {model.heads} heads, top {model.top_k}"
        facts = self.to_json()
        return [
            f"{self.config.name}: {verdict}",
            "",
            f"Layouts against one device, in float64, at most {TOLERANCE:.0e} apart: {what}, {STEPS} steps of "
            f"{train.batch_size} sequences in {train.accumulation} micro-batches.",
            "",
            *columns([head, *cells]),
            "",
            "Changed for the certificate, from and to:",
            *(f"  {path}: {old} -> {new}" for path, (old, new) in changed(self.config, self.small).items()),
            "",
            "Not certified:",
            *(f"  {what}" for what in facts["not_certified"]),
            "",
            f"{', '.join(f'{name} {version}' for name, version in facts['versions'].items())}; sha256 {facts['hash']}",
        ]

    def write(self, folder: Path) -> None:
        """Writes both files.

        Raises:
            ConfigError: the folder cannot be written.
        """
        first, *rest = self.text()
        page = "\n".join([f"# {first}", "", "```", *rest[1:], "```", ""])
        try:
            folder.mkdir(exist_ok=True)
            write_text(folder / "certificate.md", page)
            write_text(folder / "certificate.json", json_text(self.to_json()))
        except OSError as e:
            raise ConfigError(f"--folder: cannot write in {folder}: {e.strerror}") from e


def _cell(check: Check) -> str:
    return f"{check.difference:.1e}" + ("" if check.passed else " FAILED")
