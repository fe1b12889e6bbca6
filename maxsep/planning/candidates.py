"""Which layouts and meshes to plan for: all that a cluster's devices allow, or those asked for."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from maxsep.config import Config, ConfigError, MeshConfig, runs
from maxsep.config.layouts import AUTO, AXES, LAYOUTS, row
from maxsep.config.validate import validate


def asked(named: Sequence[str], config: Config, devices: int | None = None, training: bool = True) -> list[Config]:
    """The config on each of the runs that are written as `runs.TAKES` says, to train it or for inference.

    `devices`: what each must use; None: any number.

    Raises:
        ConfigError: one is mistyped, is there twice, does not fit the config, or has another number of devices.
    """
    found: list[Config] = []
    for run in named:
        layout, mesh = runs.parse(run.strip(), config.mesh)
        made = replace(config, layout=layout, mesh=mesh)
        if made in found:
            raise ConfigError(f"--runs: got {runs.name(layout, mesh)} twice; takes each once")
        try:
            validate(made, training)
        except ConfigError as e:
            raise ConfigError(f"--runs: {run}: {e}") from e
        if devices is not None and mesh.devices != devices:
            raise ConfigError(f"--runs: got {run} = {mesh.devices} devices; takes all {devices} of --cluster")
        found.append(made)
    if not found:
        raise ConfigError(f"--runs: none given; takes {runs.TAKES}")
    return found


def every(config: Config, devices: int, field: str = "--cluster", training: bool = True) -> list[Config]:
    """The config under each layout, on each mesh of so many devices that it allows; each program once.

    Layouts are those of the table, and the config's own. Only those that split layers have stages. `field` names the
    setting that has the devices, in the error.

    Raises:
        ConfigError: there is none; with what the last one that was tried would take.
    """
    found: dict[tuple, Config] = {}
    refusal: ConfigError | None = None
    own = [] if config.layout == AUTO else [config.layout]
    for layout in dict.fromkeys([*LAYOUTS, *own]):
        for shape in _shapes(devices, staged="stage" in row(layout).get("l", ())):
            mesh = replace(config.mesh, **dict(zip(AXES, shape, strict=True)))
            made = replace(config, layout=layout, mesh=mesh)
            try:
                validate(made, training)
            except ConfigError as e:
                refusal = e
                continue
            found.setdefault(_program(made), made)
    if not found:
        takes = "a number of devices over which some layout can split this config"
        raise ConfigError(f"{field}: got {devices} devices; takes {takes}; the last that was tried: {refusal}")
    return list(found.values())


def one_of_each(config: Config, devices: int) -> list[Config]:
    """The config under each layout of the table that allows so many devices, on the mesh whose axes are most alike.

    Raises:
        ConfigError: no layout does.
    """
    found: dict[str, Config] = {}
    for one in every(config, devices, "mesh"):
        best = found.get(one.layout)
        if best is None or max(one.mesh.shape) < max(best.mesh.shape):
            found[one.layout] = one
    return list(found.values())


def limits(config: Config, devices: int, training: bool = True) -> list[str]:
    """A line for each layout of the table that cannot use so many devices: how many it can."""
    return [
        f"{layout}: cannot use all {devices} devices; at most {mesh.devices}, as {runs.name(layout, mesh)}"
        for layout in LAYOUTS
        if (mesh := _largest(config, layout, devices, training)) is not None and mesh.devices < devices
    ]


def _largest(config: Config, layout: str, devices: int, training: bool) -> MeshConfig | None:
    """The first mesh of the most devices that the layout allows, all or a part of them that divides them."""
    for count in reversed(_divisors(devices)):
        for shape in _shapes(count, staged="stage" in row(layout).get("l", ())):
            mesh = replace(config.mesh, **dict(zip(AXES, shape, strict=True)))
            with contextlib.suppress(ConfigError):
                validate(replace(config, layout=layout, mesh=mesh), training)
                return mesh
    return None


def _shapes(devices: int, staged: bool) -> Iterator[tuple[int, int, int]]:
    for stage, attention in itertools.product(_divisors(devices), repeat=2):
        if devices % (stage * attention) == 0 and (stage > 1) == staged:
            yield stage, attention, devices // (stage * attention)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _program(config: Config) -> tuple:
    """What is the same of two layouts on meshes whose programs are: by how many devices which letters are split.

    An axis of size 1 splits nothing, and axes that split the same letters are as one.
    """
    axes: Counter[str] = Counter()
    splits = row(config.layout)
    if not config.model.dense_layers and not config.model.shared_experts:
        splits.pop("m", None)
    for axis, size in config.mesh.sizes.items():
        letters = "".join(sorted(letter for letter, split in splits.items() if axis in split))
        if size > 1:
            axes[letters] = size * (axes[letters] or 1)
    return tuple(sorted(axes.items()))
