"""Figures, as PNG files. matplotlib comes with the extra `viz`."""

from pathlib import Path

from maxsep.config import ConfigError, paths
from maxsep.measure.growth import AXES

# One colour a role or kind, in every picture.
COLORS = {
    "attention": "#4477aa",
    "dispatch": "#ee6677",
    "embedding, head": "#228833",
    "stages": "#ccbb44",
    "gradients": "#66ccee",
    "parameters": "#aa3377",
    "statistics": "#bbbbbb",
    "optimizer": "#882255",
    "activations": "#ddaa33",
    "communication": "#44aa99",
    "copies": "#999933",
    "rest": "#dddddd",
    "products": "#4477aa",
    "memory-bound work": "#ddaa33",
    "exposed communication": "#ee6677",
}
MEMORY = {  # kinds of a device's bytes, as they are drawn one on the other
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "communication": "received by collectives",
    "copies": "copies of arguments, by XLA",
    "rest": "all else",
}


def check(flag: str, file: str) -> Path:
    """The file of a figure that is to be drawn later.

    Raises:
        ConfigError: it cannot be written or is no .png, or matplotlib is missing.
    """
    path = paths.to_write(flag, file)
    if path.suffix != ".png" or paths.is_stream(path):
        raise ConfigError(f"{flag}: got {file!r}; takes a file that ends in .png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(f"{flag}: needs matplotlib; pip install -e '.[viz]'") from None
    return path


def memory(found: dict[str, int]) -> dict[str, int]:
    """Bytes by the kinds of `MEMORY`, of `found` by any kinds."""
    known = {kind: found.get(kind, 0) for kind in MEMORY}
    return known | {"rest": sum(found.values()) - sum(known.values())}


def stacked(axes, names: list[str], values: list[dict[str, float]], labels: dict[str, str]) -> None:
    """A bar for each name, the first on top: its values one on the other, without kinds that are too small to see."""
    left = [0.0] * len(names)
    whole = max(sum(of.values()) for of in values)
    for kind, label in labels.items():
        widths = [of[kind] for of in values]
        if max(widths) > 1e-3 * whole:
            axes.barh(range(len(names)), widths, left=left, color=COLORS[kind], label=label)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def growth(results: list[dict], path: Path) -> None:
    """Seconds of a step over what grows: a panel for each series, a line for each system."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(12, 4), layout="constrained", sharey=True)
    for axes, (series, label) in zip(panels, AXES.items(), strict=True):
        lines: dict[str, list] = {}
        for result in results:
            if result["series"] == series:
                lines.setdefault(result["system"], []).append((result["value"], result["median_seconds"]))
        for system, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=system)
        values = sorted({result["value"] for result in results if result["series"] == series})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_xlabel(label)
    for which in (panels[0].yaxis.set_major_formatter, panels[0].yaxis.set_minor_formatter):
        which(lambda seconds, _: f"{seconds:g}")
    panels[0].set_ylabel("seconds per step (median)")
    panels[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def decoding(results: list[dict], path: Path) -> None:
    """Time of a token over the context, a line for each system and batch size, and the floors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    batches = sorted({result["shape"]["batch"] for result in results})
    lines: dict[tuple, list] = {}
    for result in results:
        batch, context = result["shape"]["batch"], result["shape"]["context"]
        lines.setdefault((result["system"], batch), []).append((context, result["tpot_seconds"]["p50"]))
        if result["system"] == "maxsep":
            lines.setdefault(("floor", batch), []).append((context, result["floor_seconds"]))
    for (system, batch), points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        style = {"linestyle": ":", "alpha": 0.6} if system == "floor" else {"marker": "o"}
        color = f"C{batches.index(batch)}" if system in ("maxsep", "floor") else None
        axes.plot(x, [seconds * 1e3 for seconds in y], label=f"{system}, batch {batch}", color=color, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    contexts = sorted({result["shape"]["context"] for result in results})
    axes.set_xticks(contexts, [str(context) for context in contexts])
    ours = next(result for result in results if result["system"] == "maxsep")
    mesh = " x ".join(f"{axis} {size}" for axis, size in ours["mesh"].items())
    axes.set_title(f"{ours['layout']}: {mesh}")
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("time of a token (TPOT), ms")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)
