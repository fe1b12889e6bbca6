"""The parts of a certificate: what each proves, where it runs, and what it could not certify there.

Two processes do the work, as each can start JAX once: `EXACT` parts compute in float64 on simulated devices of the CPU,
whatever the machine has; `HERE` parts compute as the run does, on this machine's devices.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from maxsep.certification.check import Check, worst_of
from maxsep.certification.scaled import in_own_type, with_choices
from maxsep.cluster.job import ALONE, Job
from maxsep.config import Config, runs
from maxsep.parallel.start import start

EXACT, HERE = ("layouts", "moves"), ("dtype", "kernels", "collectives", "repeats")
PARTS = {
    "layouts": "each layout beside one device, in float64, on simulated devices of the CPU",
    "moves": "the state saved on one layout and restored on the next, in float64, on simulated devices of the CPU",
    "dtype": "a step in the run's type beside float64; 4 times what that type loses on one device is the bound",
    "kernels": "what computes attention and experts on this platform, beside loops in float64",
    "collectives": "what each device receives from each other, beside what it must receive",
    "repeats": "the same step twice, bit by bit",
}


class Found(NamedTuple):
    """What parts have found."""

    checks: list[Check]
    notes: list[str]  # what they saw, in words
    left: list[str]  # what they could not certify, in words
    devices: dict[str, str]  # by part, in words

    def __add__(self, other: "Found") -> "Found":
        devices = self.devices | other.devices
        return Found(self.checks + other.checks, self.notes + other.notes, self.left + other.left, devices)


def simulate() -> None:
    """Before JAX starts: devices are the CPU's, and LLVM optimises nothing: most of the time is spent compiling."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()


def begin(configs: Sequence[Config], job: Job = ALONE, fit_mesh: bool = False) -> Config:
    """Starts JAX for the config of the most devices, and returns that, on a mesh that fits if `fit_mesh`."""
    os.environ.pop("JAX_NUM_CPU_DEVICES", None)
    return start(max(configs, key=lambda config: config.mesh.devices), fit_mesh, job=job)


def exact(configs: Sequence[Config], parts: Sequence[str], folder: Path, say: Callable[[str], None], job: Job) -> Found:
    """The parts of `EXACT`. Starts JAX.

    Args:
        configs: scaled, each on its layout and mesh.
        parts: of EXACT.
        folder: to save in; all processes of the job share it.
        say: takes a line of progress.
        job: this process and the others.
    """
    simulate()
    begin(configs, job)
    import jax

    from maxsep.certification import evidence, moves
    from maxsep.certification.differences import compared
    from maxsep.certification.rig import Rig, alone, on_host
    from maxsep.parallel.mesh import describe

    checks, trained, began = [], [], time.monotonic()
    job.at("certifying")
    if "layouts" in parts:
        reference = dict(evidence.gathered(Rig(alone(configs[0]))))
        say(f"one device: {time.monotonic() - began:.0f} s")
    for config in configs:
        began, rig, name = time.monotonic(), Rig(config), runs.name(config.layout, config.mesh)
        if "layouts" in parts:
            found = dict(evidence.gathered(rig, reference["new state"]))
            checks += (of_layout := list(compared("layouts", name, found, reference, evidence.TOLERANCE)))
            say(f"{name}: {_worst(of_layout)}, {time.monotonic() - began:.0f} s")
            trained.append((rig, found[evidence.LAST]))
        else:
            trained.append((rig, on_host(rig.new_state())))
    if "moves" in parts:
        began = time.monotonic()
        scratch = _emptied(folder / "checkpoints", job)
        checks += (moved := list(moves.checks(trained, scratch, job)))
        if job.first:
            shutil.rmtree(scratch)
        say(f"moves: {_worst(moved)}, {time.monotonic() - began:.0f} s")
    return Found(agreed(checks, job), [], [], dict.fromkeys(parts, describe(jax.devices())))


def here(
    config: Config, configs: Sequence[Config], parts: Sequence[str], say: Callable[[str], None], job: Job
) -> Found:
    """The parts of `HERE`. Starts JAX.

    Args:
        config: the user's.
        configs: scaled, in float64, each on its layout and mesh.
        parts: of HERE.
        say: takes a line of progress.
        job: this process and the others.
    """
    own = [in_own_type(config, one) for one in configs]
    fitted = begin(own, job, fit_mesh=True)
    import jax

    from maxsep.certification import choices, kernels, patterns, precision
    from maxsep.certification.rig import Rig
    from maxsep.parallel.mesh import describe, make_mesh

    job.at("certifying")
    devices, platform = jax.devices(), jax.default_backend()
    alone = job.count == 1  # else the mesh is of all devices

    def fits(one: Config) -> bool:
        return one.mesh.devices == len(devices) or (alone and one.mesh.devices < len(devices))

    fit = list(filter(fits, own)) or [fitted]
    checks, notes, left = [], [], []
    for one in own:
        if one not in fit:
            name = runs.name(one.layout, one.mesh)
            left.append(f"{name} in the run's type: takes {one.mesh.devices} devices; here are {describe(devices)}")
    if "kernels" in parts:
        began = time.monotonic()
        checks += (found := list(kernels.checks(fitted.model, platform)))
        left += kernels.left(fitted.model, platform)
        say(f"kernels: {_worst(found)}, {time.monotonic() - began:.0f} s")
    if "collectives" in parts:
        meshes = {one.mesh.shape: one for one in reversed(fit)}  # of a mesh, its first layout
        for one in reversed(meshes.values()):
            began, name = time.monotonic(), runs.name(one.layout, one.mesh)
            if one.mesh.devices == 1:
                left.append(f"collectives, {name}: one device sends nothing")
                continue
            checks += (found := list(patterns.checks(make_mesh(one), name)))
            say(f"collectives, {name}: {_worst(found)}, {time.monotonic() - began:.0f} s")
    if {"dtype", "repeats"} & set(parts):
        began, reference = time.monotonic(), precision.Reference(fitted)
        if "dtype" in parts:
            notes.append(choices.note(replace(fitted, model=with_choices(fitted.model, configs[0].model)), reference))
        say(f"one device, in {config.model.products} and float64: {time.monotonic() - began:.0f} s")
        for one in fit:
            began, rig = time.monotonic(), Rig(one)
            found = [check for check in precision.checks(reference, rig) if check.part in parts]
            say(f"{runs.name(one.layout, one.mesh)}: {_worst(found)}, {time.monotonic() - began:.0f} s")
            checks += found
    return Found(agreed(checks, job), notes, left, dict.fromkeys(parts, describe(devices)))


def agreed(checks: Sequence[Check], job: Job = ALONE) -> list[Check]:
    """Of each check the worst that any process of the job has found."""
    found = job.agree([asdict(check) for check in checks])
    return [worst_of(Check(**one) for one in of_all) for of_all in zip(*found, strict=True)]


def _worst(checks: Sequence[Check]) -> str:
    worst = worst_of(checks)
    return f"{worst.difference:.1e} in {worst.quantity}" + ("" if worst.passed else f", FAILED at {worst.worst}")


def _emptied(folder: Path, job: Job) -> Path:
    """An empty folder that all processes of the job see."""
    if job.first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    job.agree(None)
    return folder
