"""A layout on a mesh as it is written on a command line: `ma:4x4`, `pp:2x1x8`."""

from dataclasses import replace

from maxsep.config.schema import ConfigError, MeshConfig

TAKES = "layout:attention x expert or layout:stage x attention x expert, as ma:4x4,tp:8x2,pp:2x1x8"
SIZES = ("mesh.stage", "mesh.attention", "mesh.expert")
FIELDS = ("layout", *SIZES)  # what a run sets


def parse(text: str, mesh: MeshConfig) -> tuple[str, MeshConfig]:
    """The layout, and `mesh` with the sizes that the run names.

    Raises:
        ConfigError: it is mistyped. Whether layout and sizes fit a model is not checked.
    """
    layout, _, shape = text.rpartition(":")
    sizes = shape.lower().split("x")
    if not layout or len(sizes) not in (2, 3) or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError(f"--runs: got {text!r}; takes {TAKES}")
    stage, attention, expert = map(int, ["1", *sizes][-3:])
    return layout, replace(mesh, stage=stage, attention=attention, expert=expert)


def name(layout: str, mesh: MeshConfig) -> str:
    """As it is written."""
    return f"{layout}:{'x'.join(map(str, mesh.shape if mesh.stage > 1 else mesh.shape[1:]))}"


def flags(layout: str, mesh: MeshConfig) -> tuple[str, ...]:
    """The flags of a command that make a config's layout and mesh these."""
    return (f"--config.layout={layout}", *(f"--config.mesh.{axis}={size}" for axis, size in mesh.sizes.items()))


def check_free(overridden: list[str]) -> None:
    """Refuses flags for what each run sets.

    Raises:
        ConfigError: a config field among them is one of `FIELDS`.
    """
    for argument in overridden:
        field = argument.lstrip("-").partition("=")[0].removeprefix("config.")
        if field in FIELDS:
            raise ConfigError(f"{field}: is set by each run of --runs; takes no flag here")
