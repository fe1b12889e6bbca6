"""Slices of text as half-open intervals (start, stop): what they leave, what they share."""

from collections.abc import Iterable, Iterator

from maxsep.config import ConfigError

Interval = tuple[float, float]


def less(interval: Interval, taken: Iterable[Interval]) -> Iterator[Interval]:
    """The parts of `interval` that none of `taken` covers, ascending."""
    start, stop = interval
    for a, b in sorted(taken):
        if start < min(a, stop):
            yield start, min(a, stop)
        start = max(start, b)
    if start < stop:
        yield start, stop


def once(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The intervals in their order, each less what those before it cover."""
    found = []
    for interval in intervals:
        found += less(interval, list(found))
    return tuple(found)


def overlap(some: Iterable[Interval], others: Iterable[Interval]) -> bool:
    """Whether anything lies in both."""
    return any(max(a, c) < min(b, d) for a, b in some for c, d in others)


def nothing_left(held_out: str) -> ConfigError:
    """What to raise where `less` finds nothing to train on beside the held-out split."""
    takes = "a part of train; the rest is trained on"
    return ConfigError(f"data.eval_split: got {held_out}, which leaves nothing to train on; takes {takes}")
