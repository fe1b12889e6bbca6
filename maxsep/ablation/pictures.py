"""The pictures of an ablation's report: PNG files, drawn with matplotlib."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from maxsep.ablation import tables
from maxsep.ablation.compare import TOLERANCE, Agreement
from maxsep.measure import plots


def draw(results: list[dict], agreed: Agreement | None, folder: Path) -> dict[str, str]:
    """Draws all that the results have figures for, and returns the pictures' names with what each shows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = {}
    for name, (caption, painter) in _pictures(results, agreed).items():
        figure = pyplot.figure(layout="constrained")
        painter(figure)
        figure.savefig(folder / name, dpi=150)
        pyplot.close(figure)
        made[name] = caption
    return made


def _pictures(results: list[dict], agreed: Agreement | None) -> dict[str, tuple[str, Callable]]:
    found = {
        "losses.png": (
            "Training loss of all runs, which lie on each other, and how far each is from the median of all",
            lambda figure: _losses(figure, results, agreed),
        ),
        "time.png": ("Time of a step, median and p10 to p90; tokens per second", lambda figure: _time(figure, results)),
    }
    counted = [result for result in results if result["sent"] is not None]
    if counted:
        found["communication.png"] = (
            "What a device gives to collectives in a step, by role",
            lambda figure: _stacked(
                figure, counted, tables.sent, {r: r for r in tables.ROLES}, "MB per device and step"
            ),
        )
    planned = [result for result in results if result["memory"] is not None]
    if planned:
        found["memory.png"] = (
            "Memory of a device at the peak, by kind",
            lambda figure: _stacked(figure, planned, tables.memory, plots.MEMORY, "MB per device at the peak"),
        )
    others = all(result["expert_shares"] == results[0]["expert_shares"] for result in results)
    of = "the same in all runs" if others else f"of {results[0]['name']}; other runs differ"
    found["load.png"] = (
        f"Share of each expert in the choices of the last step, {of}",
        lambda figure: _load(figure, results[0]),
    )
    found["drops.png"] = ("Choices that found no place in their expert", lambda figure: _drops(figure, results))
    return found


def _lines(axes, results: list[dict], of: Callable[[dict], Iterable[float]]) -> None:
    from matplotlib import colormaps

    for number, result in enumerate(results):
        style = ("-", "--", ":")[number // 10 % 3]
        color = colormaps["tab10"](number % 10)
        axes.plot(result["steps"], list(of(result)), style, color=color, label=result["name"], linewidth=1.2)


def _losses(figure, results: list[dict], agreed: Agreement | None) -> None:
    figure.set_size_inches(9, 4.5)
    left, right = figure.subplots(1, 2)
    _lines(left, results, lambda result: [np.nan if loss is None else loss for loss in result["losses"]])
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("optimizer step")
    left.set_ylabel("training loss, nats per token")
    of = {result["name"]: dict(zip(result["steps"], result["losses"], strict=True)) for result in results}
    steps = sorted(set.intersection(*(set(losses) for losses in of.values())))
    table = np.array([[np.nan if losses[step] is None else losses[step] for step in steps] for losses in of.values()])
    middle = np.median(table, axis=0)
    floor = np.finfo(float).eps / 4  # so that a difference of nothing has a place on the axis
    for (name, _), row, line in zip(of.items(), table, left.lines, strict=True):
        apart = np.maximum(np.abs(row - middle) / np.abs(middle), floor)
        right.plot(steps, apart, line.get_linestyle(), color=line.get_color(), label=name, linewidth=1.2)
    if agreed is not None and agreed.apart is not None:
        right.axhline(TOLERANCE, color="black", linewidth=0.8)
        right.annotate(
            f"tolerance {TOLERANCE:.0e}", (steps[0], TOLERANCE), (0, 4), textcoords="offset points", fontsize=8
        )
    right.set_yscale("log")
    right.set_ylim(floor / 2, max(1e-8, right.get_ylim()[1]))
    right.set_xlabel("optimizer step")
    right.set_ylabel("difference from the runs' median, relative")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def _time(figure, results: list[dict]) -> None:
    figure.set_size_inches(9, 0.32 * len(results) + 1.6)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [result["name"] for result in results]
    places = np.arange(len(names))
    middle = np.array([result["step_seconds"]["median"] for result in results])
    low, high = (np.array([result["step_seconds"][name] for result in results]) for name in ("p10", "p90"))
    left.errorbar(middle, places, xerr=[middle - low, high - middle], fmt="o", color="#4477aa", capsize=3)
    left.set_xlim(0, None)
    left.set_xlabel("seconds per step: median, p10 to p90")
    right.barh(places, [result["tokens_per_second"] for result in results], color="#4477aa")
    right.set_xlabel("tokens per second, all devices")
    left.set_yticks(places, names)
    left.invert_yaxis()


def _stacked(figure, results: list[dict], of: Callable[[dict], dict], labels: dict[str, str], unit: str) -> None:
    figure.set_size_inches(9, 0.32 * len(results) + 2)
    axes = figure.subplots()
    values = [{kind: size / 1e6 for kind, size in of(result).items()} for result in results]
    plots.stacked(axes, [result["name"] for result in results], values, labels)
    axes.set_xlabel(unit)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _load(figure, result: dict) -> None:
    shares = np.array(result["expert_shares"])
    figure.set_size_inches(9, 0.35 * len(shares) + 1.8)
    axes = figure.subplots()
    image = axes.imshow(shares * 100, aspect="auto", cmap="viridis", vmin=0)
    first = result["config"]["model"]["layers"] - len(shares)  # dense layers come before
    names = [f"{number}: {of.max() * of.size - 1:.2f}" for number, of in enumerate(shares, first)]
    if (norms := result.get("router_bias_norm")) is not None:
        names = [f"{name}, {norm:.3f}" for name, norm in zip(names, norms, strict=True)]
    axes.set_yticks(range(len(shares)), names)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer: MaxVio" + (", norm of its bias" if result.get("router_bias_norm") else ""))
    if shares.shape[1] <= 32:
        axes.set_xticks(range(shares.shape[1]))
    figure.colorbar(image, label=f"share of choices, %\n(even: {100 / shares.shape[1]:.2f})")


def _drops(figure, results: list[dict]) -> None:
    figure.set_size_inches(9, 4)
    axes = figure.subplots()
    _lines(axes, results, lambda result: [100 * share for share in result["dropped"]])
    axes.set_ylim(0, None)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("dropped choices, %")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
