"""Draws docs/maxsep.png, the README's picture, from an ablation: `python benchmarks/picture.py runs/ablation`.

Left, the 4 x 4 mesh of configs/tiny.py; right, the losses of all of the ablation's runs, which lie on each other, and
under them how far each is from their median.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

OUT = Path(__file__).resolve().parents[1] / "docs" / "maxsep.png"
SIZE = 4  # of each axis of the mesh
HEADS, EXPERTS = "#1f6f8b", "#c8553d"


def mesh(axes: Axes) -> None:
    """Devices in a square: heads go down it, experts across."""
    for row in range(SIZE):
        for column in range(SIZE):
            axes.add_patch(plt.Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, color=HEADS, alpha=0.15 + 0.13 * row))
            band = plt.Rectangle((column + 0.06, row + 0.66), 0.88, 0.28, color=EXPERTS, alpha=0.35 + 0.2 * column)
            axes.add_patch(band)
            axes.text(column + 0.5, row + 0.38, f"device {SIZE * row + column}", ha="center", va="center", fontsize=8)
    for number in range(SIZE):
        first, last = SIZE * number, SIZE * number + SIZE - 1
        axes.text(-0.08, number + 0.5, f"heads\n{first}–{last}", ha="right", va="center", color=HEADS, fontsize=9)
        axes.text(number + 0.5, -0.1, f"experts\n{first}–{last}", ha="center", va="bottom", color=EXPERTS, fontsize=9)
    axes.text(-1.0, SIZE / 2, "mesh axis attention", rotation=90, ha="center", va="center", color=HEADS, fontsize=10)
    axes.text(SIZE / 2, -0.85, "mesh axis expert", ha="center", va="center", color=EXPERTS, fontsize=10)
    axes.set(xlim=(-1.15, SIZE), ylim=(SIZE, -1.0), aspect="equal")
    axes.axis("off")
    axes.set_title("One mesh, two axes: attention and experts are split separately", fontsize=11)


def losses(above: Axes, below: Axes, report: dict) -> None:
    """Each run's loss by step, and how far it is from the median of all."""
    found = np.array([run["losses"] for run in report["runs"]])
    steps, median = report["runs"][0]["steps"], np.median(found, axis=0)
    apart = np.abs(found - median) / median
    for run, of, far in zip(report["runs"], found, apart, strict=True):
        above.plot(steps, of, linewidth=1)
        below.semilogy(steps, np.maximum(far, 1e-17), linewidth=0.8, label=run["name"])
    above.set_title(f"{len(found)} layouts and meshes, one loss", fontsize=11)
    above.set_ylabel("loss, nats per token")
    above.tick_params(labelbottom=False)
    below.axhline(apart.max(), color="black", linewidth=0.8, linestyle="--")
    below.text(steps[-1], 1.6 * apart.max(), f"largest difference: {apart.max():.1e}", ha="right", fontsize=9)
    below.set(ylim=(1e-17, 1e-13), xlabel="step", ylabel="relative difference\nfrom the median")
    above.legend(*below.get_legend_handles_labels(), fontsize=6, ncols=2, loc="upper right")


def main(folder: str) -> None:
    report = json.loads((Path(folder) / "ablation.json").read_text(encoding="utf-8"))
    figure = plt.figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    mesh(left.add_subplot())
    above, below = right.subplots(2, 1, height_ratios=(2, 1), sharex=True)
    losses(above, below, report)
    figure.savefig(OUT, dpi=110)
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
