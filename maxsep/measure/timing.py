"""How a step is timed, the same for maxsep and for the systems it is compared with.

Only the standard library: the scripts in benchmarks/peers import this in environments of their own.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable


class OtherCPU:
    """Cores that other processes keep busy from now on. A timing taken beside 0.1 or more of them says little."""

    def __init__(self):
        self.start = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Mean over the time since the start; None where the system does not tell."""
        wall, busy, own = self.start
        if busy is None:
            return None
        others = (_busy_seconds() - busy) - (_own_seconds() - own)
        return max(0.0, others) / (time.perf_counter() - wall)


def _busy_seconds() -> float | None:
    """Processor time that all processes have used since the machine started."""
    try:
        with open("/proc/stat") as f:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, f.readline().split()[1:9])
    except OSError:
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def timed(step: Callable[[], object], count: int) -> dict:
    """One turn: runs `step`, which returns when its work is done, `count` times.

    Returns `seconds` (a list, one a step) and `other_cpu` (cores, or None).
    """
    others, seconds = OtherCPU(), []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "other_cpu": others.cores()}


def measurement(facts: dict, turns: Iterable[dict]) -> dict:
    """The JSON object of a measurement: `facts`, what was timed, and the steps of all `turns` together."""
    turns = list(turns)
    seconds = sorted(s for turn in turns for s in turn["seconds"])
    others = [turn["other_cpu"] for turn in turns]
    weights = [sum(turn["seconds"]) for turn in turns]
    median = statistics.median(seconds)
    shape = facts["shape"]
    return facts | {
        "median_seconds": median,
        "min_seconds": seconds[0],
        "p10_seconds": quantile(seconds, 0.1),
        "p90_seconds": quantile(seconds, 0.9),
        "steps": len(seconds),
        "tokens_per_second": shape["batch"] * shape["sequence"] / median,
        "other_cpu": None if None in others else round(statistics.fmean(others, weights), 3),
    }


def decoding(facts: dict, turns: Iterable[dict]) -> dict:
    """The JSON object of a measurement of decoding: `facts`, and the tokens of all `turns` together.

    A turn has `prefill`, seconds to the first token of each generation, `seconds` of each token after, and `other_cpu`.
    """
    turns, shape = list(turns), facts["shape"]
    prefill, seconds = (sorted(s for turn in turns for s in turn[name]) for name in ("prefill", "seconds"))
    others = [turn["other_cpu"] for turn in turns]
    # All tokens of a generation, its prompt's time included.
    whole = sum(prefill) + sum(seconds)
    speed = shape["batch"] * shape["new"] * len(prefill) / whole
    return facts | {
        "ttft_seconds": spread(prefill),
        "tpot_seconds": spread(seconds),
        "generations": len(prefill),
        "tokens_per_second": speed,
        "tokens_per_second_per_device": speed / facts["devices"],
        "decode_tokens_per_second": shape["batch"] / statistics.median(seconds),
        "other_cpu": None if None in others else round(statistics.fmean(others), 3),
    }


def spread(seconds: Iterable[float]) -> dict[str, float]:
    """Mean, p50, p99 and least."""
    ordered = sorted(seconds)
    return {
        "mean": statistics.fmean(ordered),
        "p50": quantile(ordered, 0.5),
        "p99": quantile(ordered, 0.99),
        "min": ordered[0],
    }


def quantile(ordered: list[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, between neighbours linear."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
