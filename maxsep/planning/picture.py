"""A plan as a picture: where each row's step and memory go. A PNG file, drawn with matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from maxsep.config.cluster import Cluster
from maxsep.measure import plots
from maxsep.planning.rows import PARTS, Row, pool

SIDES = 0.3, 2.1  # inches: a bar with the gap beside it, and all around the bars


def draw(rows: Sequence[Row], title: str, cluster: Cluster, path: Path) -> None:
    """Stacked bars of the rows that compiled, in their order; `title` is printed above them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    good = [row for row in rows if row.error is None]
    names = [_name(row, good) for row in good]
    figure = plt.figure(figsize=(11, SIDES[0] * len(good) + SIDES[1]), layout="constrained")
    panels = figure.subfigures(1, 2)
    left, right = (panel.subplots() for panel in panels)
    seconds = [{part: getattr(row, name) for part, name in PARTS.items()} for row in good]
    plots.stacked(left, names, seconds, {part: part for part in PARTS})
    for place, row in enumerate(good):
        left.plot(row.ranges["step_seconds"], [place] * 2, color="black", linewidth=1, marker="|", markersize=5)
    left.set_xlabel("seconds per step; line: from the fastest to the slowest that is likely")
    sizes = [{kind: size / 1e9 for kind, size in row.memory_bytes.items() if kind != "total"} for row in good]
    plots.stacked(right, names, [plots.memory(of) for of in sizes], plots.MEMORY)
    there, largest = pool(cluster) * cluster.memory_bytes / 1e9, right.get_xlim()[1]
    if there < 4 * largest:  # else the bars could not be seen beside it
        right.axvline(there, color="black", linewidth=1, linestyle="--", label="what fits")
    right.set_xlabel("GB (1e9 bytes) per device")
    for panel, kinds in zip(panels, (PARTS, plots.MEMORY), strict=True):
        # As many lines of it below both, so that the bars of a row lie beside each other.
        panel.legend(loc="outside lower center", ncols=-(-len(kinds) // 2), fontsize=8, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _name(row: Row, rows: Sequence[Row]) -> str:
    """With the order of its devices, where another row has the other."""
    alone = sum(other.name == row.name for other in rows) == 1
    return row.name if alone else f"{row.name} {row.inner}"
