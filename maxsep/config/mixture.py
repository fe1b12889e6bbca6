"""`data.mixture`: the sources that a run draws its records from, and each one's share of them."""

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction

SOURCES = ("docstrings", "tfds", "files", "tokens")
TAKES = "NAME:WEIGHT:PATH or NAME:WEIGHT:SOURCE:PATH, joined by commas, or a list of (name, weight, source, path)"


@dataclass(frozen=True, repr=False)
class Share:
    """A source of a mixture. Where its text lies is no part of what a run means: its fingerprint is."""

    name: str
    weight: float  # share of the training tokens
    source: str  # as data.source
    path: str | None = field(compare=False)  # as data.path

    def __repr__(self) -> str:
        return ":".join(map(str, (self.name, self.weight, self.source, *([self.path] if self.path else []))))


Shares = tuple[Share, ...]


def parse(value) -> Shares:
    """A mixture, as it is written on a command line, in a config file, or in a run's config.json.

    Raises:
        ValueError: it is none; the message is the reason.
    """
    entries = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(f"got {value!r}; takes {TAKES}")
    shares = tuple(map(_share, entries))
    for i, share in enumerate(shares):
        if share.name in {other.name for other in shares[:i]}:
            raise ValueError(f"{share.name} is there twice; takes each name once")
    total = math.fsum(share.weight for share in shares)
    if abs(total - 1) > 1e-3:
        raise ValueError(f"the weights add up to {total:g}; takes shares of the tokens, which add up to 1")
    return shares


def ratio(shares: Shares) -> list[int]:
    """The weights as integers in exactly the ratio of their decimal digits."""
    exact = [Fraction(repr(share.weight)) for share in shares]
    scale = math.lcm(*(weight.denominator for weight in exact))
    return [int(weight * scale) for weight in exact]


def _share(entry) -> Share:
    if isinstance(entry, Share):
        return entry
    if isinstance(entry, dict):
        entry = [entry.get(name) for name in ("name", "weight", "source", "path")]
    if isinstance(entry, str):
        parts = entry.split(":", 2)
        if len(parts) == 3:
            source, _, path = parts[2].partition(":")
            entry = [*parts[:2], source, path] if source in SOURCES else [*parts[:2], "files", parts[2]]
    if not isinstance(entry, list | tuple) or len(entry) != 4:
        raise ValueError(f"got {_shown(entry)!r}; takes {TAKES}")
    name, weight, source, path = entry
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{name!r} is no name; takes letters, digits, and . _ -")
    try:
        weight = float(weight)
    except (TypeError, ValueError):
        raise ValueError(f"{name} has the weight {weight!r}; takes a number above 0, up to 1") from None
    if not 0 < weight <= 1:
        raise ValueError(f"{name} has the weight {weight:g}; takes a number above 0, up to 1")
    if source not in SOURCES:
        raise ValueError(f"{name} has the source {source!r}; takes {', '.join(SOURCES)}")
    if (source == "docstrings") == bool(path) or not isinstance(path, str | None):
        takes = "none" if source == "docstrings" else "one"
        raise ValueError(f"{name} has the path {path!r}; takes {takes}, as its source is {source}")
    return Share(name, weight, source, path or None)


def _shown(entry) -> str:
    return ":".join(map(str, entry)) if isinstance(entry, list | tuple) else str(entry)
