"""`certify --plant`: whether a certificate fails where a fault is planted, and in the quantity that names it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from maxsep.certification import certificate
from maxsep.certification.plants import PLANTS, Plant, planted
from maxsep.certification.scaled import GROUP, scaled
from maxsep.config import Config, ConfigError, cli, runs
from maxsep.config.validate import validate


def missed(config: Config, named: str, say: Callable[[str], None]) -> list[str]:
    """Names of the plants that the certificate does not see. Reports each plant, and those that cannot be planted.

    First, the same layouts have to pass without a plant.

    Args:
        config: the user's.
        named: a plant, or all.
        say: takes a line.

    Raises:
        ConfigError: there is no such plant, or none can be planted in this config.
        cli.Exit: a layout differs without a plant.
    """
    plants = [plant for plant in PLANTS if named in ("all", plant.name)]
    if not plants:
        raise ConfigError(f"--plant: got {named}; takes all, or {', '.join(plant.name for plant in PLANTS)}")
    configs = {plant: _on(config, plant.run, plants) for plant in plants}
    for plant, one in list(configs.items()):
        try:
            validate(one)
        except ConfigError as e:
            del configs[plant]
            say(f"{plant.name}: not planted on {plant.run}: {e}")
    if not configs:
        raise ConfigError(f"--plant: got {named}, and this config allows none of its layouts; takes another config")
    certificate.start(list(configs.values()))
    from maxsep.certification import evidence

    reference, out = evidence.gather(evidence.alone(next(iter(configs.values())))), []
    for run, one in {plant.run: one for plant, one in configs.items()}.items():
        for check in evidence.compared(run, evidence.gather(one, reference["start"]), reference):
            if not check.passed:
                raise cli.Exit(certificate.FAILED, f"without a plant: {run}: {check.quantity} differs at {check.worst}")
        say(f"without a plant: {run} passed")
    for plant, one in configs.items():
        began = time.monotonic()
        with planted(plant):
            found = evidence.compared(plant.run, evidence.gather(one, reference["start"]), reference)
            failed = {check.quantity: check for check in found if not check.passed}
        seen = failed.get(plant.quantity)
        seconds = f"{time.monotonic() - began:.0f} s"
        if seen is None:
            out.append(plant.name)
            say(f"{plant.name}: MISSED on {plant.run}: nothing in {plant.quantity}, {seconds}")
        else:
            where = f"{plant.quantity}, {seen.difference:.1e} at {seen.worst}"
            say(f"{plant.name}: seen on {plant.run} in {where}, {seconds}")
    return out


def _on(config: Config, run: str, plants: Sequence[Plant]) -> Config:
    """The config of the certificate on the plant's mesh; with drops and dropout, which show who computed what."""
    parsed = [runs.parse(plant.run, config.mesh) for plant in plants]
    asked = [replace(config, layout=layout, mesh=mesh) for layout, mesh in parsed]
    small = scaled(config, asked)
    model = replace(small.model, capacity_factor=1.0, capacity_group=GROUP, expert_dropout=0.1)
    layout, mesh = runs.parse(run, config.mesh)
    return replace(small, layout=layout, mesh=mesh, model=model)
