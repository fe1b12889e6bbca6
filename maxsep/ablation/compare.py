"""What the runs of an ablation say about each other: whether their losses are the same, and how speed scales."""

import statistics
from typing import NamedTuple

TOLERANCE = 1e-9  # of float64 losses: what reordered sums may differ by, far below any fault


class Agreement(NamedTuple):
    """`difference`: the largest of any loss from the median of all runs, relative; by run in `of_runs`.

    `apart`: runs whose differ by more than `TOLERANCE`; None where nothing follows from it, as `text` says.
    """

    difference: float
    of_runs: dict[str, float]
    steps: int
    apart: list[str] | None
    text: str


def agreement(results: list[dict]) -> Agreement | None:
    """Of the results of runs that ended well; None of fewer than two."""
    if len(results) < 2:
        return None
    steps = sorted(set.intersection(*(set(result["steps"]) for result in results)))
    losses = {result["name"]: dict(zip(result["steps"], result["losses"], strict=True)) for result in results}
    middle = {step: statistics.median(_number(of[step]) for of in losses.values()) for step in steps}
    of_runs = {name: max(_apart(of[step], middle[step]) for step in steps) for name, of in losses.items()}
    worst = max(of_runs, key=of_runs.get)
    difference = of_runs[worst]
    told = f"largest difference of a loss from the median of {len(results)} runs, over {len(steps)} steps"
    told += f": {difference:.1e} of it ({worst})"
    if reason := _no_verdict(results[0]["config"]):
        return Agreement(difference, of_runs, len(steps), None, f"{told}. No verdict, as {reason}")
    apart = [name for name, of in of_runs.items() if not of <= TOLERANCE]
    if apart:
        text = f"WARNING: losses are not the same: {', '.join(apart)} above {TOLERANCE:.0e}; {told}"
        if len(results) == 2:
            text += ". Of two runs it cannot be told which is wrong"
        return Agreement(difference, of_runs, len(steps), apart, text)
    return Agreement(difference, of_runs, len(steps), [], f"all losses agree to {TOLERANCE:.0e}: {told}")


def _no_verdict(config: dict) -> str | None:
    model = config["model"]
    if model["dtype"] != "float64":
        return f"rounding in {model['dtype']} may tip a token's choice of experts, and runs then part for good"
    if model["capacity_factor"] is not None and model["capacity_group"] is None:
        return "the mesh decides which tokens are dropped: model.capacity_group is None"
    return None


def _number(loss: float | None) -> float:
    return float("inf") if loss is None else loss  # which was not finite


def _apart(loss: float | None, middle: float) -> float:
    if loss is None or middle == float("inf"):
        return float("inf")
    return abs(loss - middle) / abs(middle)


def against_one_peak(results: list[dict]) -> list[dict]:
    """The results with their MFU against the highest peak that any run knows of so many devices.

    On a CPU each run measures the peak when it starts, beside whatever else the machine does then.
    """
    peaks: dict[int, float] = {}
    for result in results:
        if result["mfu"]:
            one = result["tokens_per_second"] / result["mfu"]
            count = 1 if result["device_kind"] == "cpu" else result["devices"]  # simulated ones share one peak
            peaks[count] = max(peaks.get(count, 0), one)
    out = []
    for result in results:
        peak = peaks.get(1 if result["device_kind"] == "cpu" else result["devices"])
        out.append(result | {"mfu": result["tokens_per_second"] / peak if result["mfu"] else None})
    return out


def efficiency(results: list[dict]) -> dict[str, float]:
    """Scaling efficiency of each run: tokens per second and device, over those of its layout's run on 4 devices.

    That is (speed-up on n / n) / (speed-up on 4 / 4), the study's definition. Where a layout has none on 4, its fewest
    are the base. {} where all runs have as many devices.
    """
    if len({result["devices"] for result in results}) < 2:
        return {}
    out = {}
    for result in results:
        same = [other for other in results if other["layout"] == result["layout"]]
        fours = [other for other in same if other["devices"] == 4]
        base = fours[0] if fours else min(same, key=lambda other: other["devices"])
        out[result["name"]] = result["tokens_per_second_per_device"] / base["tokens_per_second_per_device"]
    return out
