"""A plan as tables for people."""

from collections.abc import Sequence

from maxsep.config.cluster import Cluster
from maxsep.measure.report import columns
from maxsep.planning.rows import DEFAULT_POOL, LARGER_POOL, REACHED, ROOFLINE, Row, largest_part


def text(rows: Sequence[Row], best: Row | None, cluster: Cluster) -> list[str]:
    """The lines: what each row needs and takes, where its time goes, and the first row in detail.

    Args:
        rows: sorted, as `rows.of` makes them.
        best: the row to mark; None: none fits.
        cluster: with all its rates.
    """
    good = [row for row in rows if row.error is None]
    failed = [row for row in rows if row.error is not None]
    lines = []
    if good:
        lines += [*_needs(good, best, cluster), "", *_times(good), "", *_detail(good[0])]
    if failed:
        lines += ["", "did not compile:", *(f"  {row.name}: {row.error}" for row in failed)]
    return lines


def _needs(rows: Sequence[Row], best: Row | None, cluster: Cluster) -> list[str]:
    head = ("layout:mesh", "inner", "GB", "fits", "step s", "tokens/s per device", "MFU %", "mJ/token", "most of it")
    cells = []
    for row in rows:
        fits = "yes" if row.fits else f"no: {giga(row.memory_bytes_of_a_device)}"
        marked = row.name + (" *" if row is best else "")
        speeds = [_range(row, "step_seconds"), _range(row, "tokens_per_second_per_device", ",.0f")]
        speeds += [_range(row, "mfu", ".0f", 100), _range(row, "energy_joules_per_token", unit=1e3)]
        cells.append((marked, row.inner, giga(row.memory_bytes["total"]), fits, *speeds, largest_part(row)))
    return [*columns([head, *cells]), "", *needed(cluster), basis(cluster)]


def needed(cluster: Cluster) -> list[str]:
    """What the columns of memory are."""
    lines = ["GB (1e9 bytes) per device: what XLA reserves for the program, its arguments and results."]
    if cluster.gpu:
        return [
            *lines,
            f"fits: in {LARGER_POOL:.0%} of a device's {giga(cluster.memory_bytes)} GB, as maxsep lets XLA take "
            f"(XLA's default: {DEFAULT_POOL:.0%}); no: with the GB that a device would need.",
            "NCCL, workspaces and the CUDA context take 1 to 3 GB more, which are not counted.",
        ]
    if cluster.tpu:
        return [*lines, f"fits: in a device's {giga(cluster.memory_bytes)} GB."]
    return [*lines, f"fits: of {giga(cluster.memory_bytes)} GB, a device's share of what this machine has left."]


def basis(cluster: Cluster) -> str:
    """What the times are."""
    if cluster.reached is None:
        return f"Times: from a roofline of the compiled program to that divided by {REACHED}. Nothing was run."
    shares = ", ".join(f"{name} {share:.0%}" for name, share in cluster.reached.items())
    least, most = cluster.spread or ROOFLINE
    reached = f"{shares}; {cluster.latency * 1e3:.2g} ms per message of a collective"
    fitted = f"at the shares of the cluster's rates that measured steps reach ({reached})"
    return f"Times: of the compiled program, {fitted}, times {least:.2f} to {most:.2f}."


def _times(rows: Sequence[Row]) -> list[str]:
    head = ("seconds of a step", "inner", "products", "memory", "exposed", "inside", "between")
    cells = []
    for row in rows:
        links = [row.link_seconds[link] for link in ("inside", "between")]
        parts = row.products_seconds, row.memory_seconds, row.exposed_seconds
        sent = [giga(row.link_bytes[link]) for link in ("inside", "between")]
        counted = f"{row.flops / 1e12:,.4g}", f"{row.flops / row.model_flops:.2f}"
        seconds = [_three(value) for value in (*parts, *links)]
        cells.append((row.name, row.inner, *seconds, *sent, *counted, f"{row.bubble:.1%}"))
    lines = columns([(*head, "GB inside", "GB between", "TFLOP", "x model's", "bubble"), *cells])
    lines += [
        "",
        "products at peak, memory-bound work beyond them, and exposed communication, which nothing covers: the step.",
        "inside, between: what collectives take on the links of a node and between nodes, covered or not.",
    ]
    return lines + not_priced({name for row in rows for name in row.not_priced})


def not_priced(names: set[str]) -> list[str]:
    """A line for each thing that is in no figure."""
    return [f"not priced: {name}{_counted(name)}" for name in sorted(names)]


def _counted(name: str) -> str:
    """What is, of something that is not."""
    if "further rounds" in name:
        return " (usually none is needed: the metric exchange_rounds)"
    return " (one turn is)" if "loop" in name else ""


def _detail(row: Row) -> list[str]:
    kinds = sorted(row.memory_bytes.items(), key=lambda item: -item[1])
    total = row.memory_bytes["total"]
    shown = [(kind, giga(size)) for kind, size in kinds if size >= total / 1000 and kind != "total"]
    lines = columns([(f"{row.name}: memory", "GB"), *shown])
    head = (f"{row.name}: collectives", "kind", "times", "GB", "s inside", "s between", "s exposed")
    cells = []
    for one in sorted(row.collectives, key=lambda one: -one["inside_seconds"] - one["between_seconds"]):
        seconds = (one["inside_seconds"], one["between_seconds"], one["exposed_seconds"])
        kind = one["kind"] + (", ahead" if one["ahead"] else "")
        figures = [f"{one['times']:,.0f}", giga(one["operand_bytes"]), *map(_three, seconds)]
        cells.append((one["role"], kind, *figures))
    return [*lines, "", *columns([head, *cells])] if cells else lines


def _range(row: Row, name: str, form: str | None = None, unit: float = 1) -> str:
    return "unknown" if getattr(row, name) is None else span([x * unit for x in row.ranges[name]], form)


def span(values: Sequence[float], form: str | None = None) -> str:
    """From the lower figure to the higher."""
    return "–".join(f"{value:{form}}" if form else _three(value) for value in sorted(values))


def _three(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}" if value >= 1e-3 else f"{value:.3f}"


def giga(size: float) -> str:
    """In GB, of 1e9 bytes."""
    return f"{size / 1e9:,.1f}" if size >= 1e9 else f"{size / 1e9:.2g}" if size >= 1e5 else "0"
