"""What is trained on and what is held out, decided for each document by a hash of its own text.

A document's place, in [0, 1), is that hash. A slice `train[90%:]` has the documents of the split `train` whose place is
0.9 or more. So a document stays on its side when its file is renamed, copied or grows, or others are added.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from maxsep.config import ConfigError

BYTES_A_TOKEN = 4  # of English text in GPT-2's tokens, roughly
HELD_OUT = 0.1  # of `train`, where nothing else says how much
Interval = tuple[float, float]  # of places: from the first on, less than the second


class Document(NamedTuple):
    """A document, or a section of a long one."""

    content: str | np.ndarray  # text, or token ids [n]
    place: float
    at: str  # where it lies, for messages
    following: float | None = None  # the place of the section that continues it


@dataclass(frozen=True)
class Sides:
    """The places of a split that are trained on, and those that are held out."""

    train: tuple[Interval, ...] = ()
    held_out: tuple[Interval, ...] = ()

    def of(self, place: float | None) -> str | None:
        """train, eval, or None for a place that is neither, or is none."""
        if place is None:
            return None
        if any(a <= place < b for a, b in self.train):
            return "train"
        return "eval" if any(a <= place < b for a, b in self.held_out) else None


def place(content: bytes) -> float:
    """Where in [0, 1) a document of this content lies."""
    # 53 bits: what a float below 1 can hold.
    return (int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 11) / (1 << 53)


def sides(train: str | None, held_out: str | None, sizes: dict[str, int], most: int | None) -> dict[str, Sides]:
    """The sides of each split that is read; those with training text come first.

    By default the split `validation` is held out if there is one, else up to 10 % of `train`; what of `train` is not
    held out is trained on. Of what is held out, the highest places are taken, as many as make about `most` tokens, so
    that a corpus that grows never holds out a document that it was trained on before.

    Args:
        train: `data.split`.
        held_out: `data.eval_split`.
        sizes: bytes of text of each split of the source, roughly; 0 where it is small.
        most: tokens to hold out, roughly; None: all of the held-out split.

    Raises:
        ConfigError: a split that is not there, is not of the form `NAME[a%:b%]`, or overlaps the other.
    """
    default = "validation" if "validation" in sizes else f"train[{100 * (1 - HELD_OUT):g}%:]"
    named = _parsed("data.eval_split", held_out or default, sizes)
    evaluated = {name: _highest(taken, sizes[name], most) for name, taken in named.items()}
    if train:
        trained = _parsed("data.split", train, sizes)
        for name in trained.keys() & named.keys():
            if any(max(a, c) < min(b, d) for a, b in trained[name] for c, d in named[name]):
                raise ConfigError(f"data.split: got {train}, which overlaps the held-out split {held_out or default}")
    elif "train" not in sizes:
        raise ConfigError(f"data.split: got None; takes splits of {_listed(sizes)}, as this text has no split train")
    else:
        # All of a slice that was asked for stays out of training; by default nothing is left unused.
        kept_out = named if held_out else evaluated
        trained = {"train": tuple(_less((0, 1), kept_out.get("train", ())))}
        if not trained["train"]:
            takes = "a part of train; the rest is trained on"
            raise ConfigError(f"data.eval_split: got {held_out}, which leaves nothing to train on; takes {takes}")
    return {name: Sides(trained.get(name, ()), evaluated.get(name, ())) for name in [*trained, *evaluated]}


def above(highest: float, found: dict[str, Sides]) -> dict[str, Sides]:
    """The sides with what of `train` lies at `highest` or above held out, and nothing else."""
    kept = tuple((a, min(b, highest)) for a, b in found["train"].train if a < highest)
    return found | {"train": Sides(kept, ((highest, 1.0),))}


def described(found: dict[str, Sides], most: int | None) -> str:
    """What is held out, for the console."""
    shares = {name: sum(b - a for a, b in its.held_out) for name, its in found.items() if its.held_out}
    held_out = " and ".join(f"{100 * share:.3g} % of {name}" for name, share in shares.items())
    limit = "" if most is None else f", up to {most:,} tokens (data.eval_max_tokens)"
    return f"{held_out}, by a hash of each document{limit}"


def _parsed(field: str, splits: str, names: Iterable[str]) -> dict[str, tuple[Interval, ...]]:
    """The places of each split that `a[:10%]+b` names, each place once."""
    found: dict[str, list[Interval]] = {}
    for term in splits.split("+"):
        match = re.fullmatch(r"([\w.-]+)(?:\[(?:([\d.]+)%)?:(?:([\d.]+)%)?\])?", term.strip())
        try:
            a, b = (float(match[2] or 0), float(match[3] or 100)) if match else (0, 0)
        except ValueError:  # two points
            a, b = 0, 0
        if not 0 <= a < b <= 100:
            raise ConfigError(f"{field}: got {splits}; takes a split, or slices of it in percent, as train[:90%]")
        if match[1] not in names:
            raise ConfigError(f"{field}: got {splits}; takes splits of {_listed(names)}, as train[:90%]")
        taken = found.setdefault(match[1], [])
        taken += list(_less((a / 100, b / 100), taken))
    return {name: tuple(taken) for name, taken in found.items()}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _less(interval: Interval, taken: Iterable[Interval]) -> Iterator[Interval]:
    """The parts of `interval` that none of `taken` covers, ascending."""
    start, stop = interval
    for a, b in sorted(taken):
        if start < min(a, stop):
            yield start, min(a, stop)
        start = max(start, b)
    if start < stop:
        yield start, stop


def _highest(intervals: Iterable[Interval], size: int, most: int | None) -> tuple[Interval, ...]:
    """The highest places of the intervals: their length is halved while they hold more than `most` tokens twice over.

    Halved, so that a corpus may grow to twice its size before anything moves.
    """
    length = sum(b - a for a, b in intervals)
    while most is not None and length * size >= 2 * most * BYTES_A_TOKEN:
        length /= 2
    found = []
    for a, b in sorted(intervals, reverse=True):
        if length > 0:
            found.append((max(a, b - length), b))
        length -= b - a
    return tuple(found)
