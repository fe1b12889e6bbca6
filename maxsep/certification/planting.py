"""`certify --plant`: whether a certificate fails where a fault is planted, and in the quantity that names it."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from maxsep.certification import evidence, kernels, moves, parts, patterns
from maxsep.certification.certificate import FAILED
from maxsep.certification.check import Check
from maxsep.certification.differences import compared
from maxsep.certification.plants import PLANTS, Plant, planted
from maxsep.certification.rig import Rig, alone
from maxsep.certification.scaled import GROUP, scaled
from maxsep.config import Config, ConfigError, cli, runs
from maxsep.config.validate import validate
from maxsep.parallel.mesh import make_mesh

BIAS_RATE = 0.01


def missed(config: Config, named: str, say: Callable[[str], None]) -> list[str]:
    """Names of the plants that the certificate does not see. Reports each plant, and those that cannot be planted.

    First, the same parts have to pass without a plant. Starts JAX.

    Args:
        config: the user's.
        named: a plant, or all.
        say: takes a line.

    Raises:
        ConfigError: there is no such plant, or none can be planted in this config.
        cli.Exit: something differs without a plant.
    """
    plants = [plant for plant in PLANTS if named in ("all", plant.name)]
    if not plants:
        raise ConfigError(f"--plant: got {named}; takes all, or {', '.join(plant.name for plant in PLANTS)}")
    configs = {plant: on(config, plant.run, plants) for plant in plants}
    for plant, one in list(configs.items()):
        try:
            validate(one)
        except ConfigError as e:
            del configs[plant]
            say(f"{plant.name}: not planted on {plant.run}: {e}")
    if not configs:
        raise ConfigError(f"--plant: got {named}, and this config allows none of its layouts; takes another config")
    parts.begin(list(configs.values()))
    began = time.monotonic()
    reference = dict(evidence.gathered(Rig(alone(next(iter(configs.values()))))))
    say(f"one device: {time.monotonic() - began:.0f} s")
    for (run, part), one in {(plant.run, plant.part): one for plant, one in configs.items()}.items():
        for check in _checks(one, part, reference):
            if not check.passed:
                raise cli.Exit(FAILED, f"without a plant: {run}: {check.quantity} differs at {check.worst}")
        say(f"without a plant: {part}, {run} passed")
    out = []
    for plant, one in configs.items():
        began = time.monotonic()
        with planted(plant):
            seen = next(check for check in _checks(one, plant.part, reference) if check.quantity == plant.quantity)
        where = f"{plant.quantity}, {seen.difference:.1e} at {seen.worst}, {time.monotonic() - began:.0f} s"
        say(f"{plant.name}: {'MISSED' if seen.passed else 'seen'} on {plant.run} in {where}")
        out += [plant.name] if seen.passed else []
    return out


def _checks(config: Config, part: str, reference: dict[str, Any]) -> Iterator[Check]:
    """Those of a part of the certificate, as they come."""
    run = runs.name(config.layout, config.mesh)
    if part == "layouts":
        for quantity, found in evidence.gathered(Rig(config), reference["new state"]):
            yield from compared(part, run, {quantity: found}, reference, evidence.TOLERANCE)
    elif part == "moves":
        rig = Rig(config)
        with tempfile.TemporaryDirectory() as folder:
            yield from moves.checks([(rig, reference[evidence.LAST])], Path(folder))
    elif part == "collectives":
        yield from patterns.checks(make_mesh(config), run)
    else:
        yield from kernels.checks(config.model, jax.default_backend())


def on(config: Config, run: str, plants: Sequence[Plant]) -> Config:
    """The config of the certificate on the plant's mesh, with what shows who computed what.

    These are drops, dropout, and biases that balance.
    """
    parsed = [runs.parse(plant.run, config.mesh) for plant in plants]
    asked = [replace(config, layout=layout, mesh=mesh) for layout, mesh in parsed]
    small = scaled(config, asked)
    rate = small.model.router_bias_rate or (BIAS_RATE if small.model.top_k < small.model.experts else 0.0)
    model = replace(small.model, capacity_factor=1.0, capacity_group=GROUP, expert_dropout=0.1, router_bias_rate=rate)
    layout, mesh = runs.parse(run, config.mesh)
    return replace(small, layout=layout, mesh=mesh, model=model)
