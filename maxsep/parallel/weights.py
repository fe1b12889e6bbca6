"""The model's matrices by how a layout splits them, counted without making them."""

import math
from typing import NamedTuple

from maxsep.config import Config
from maxsep.config.layouts import AXES
from maxsep.config.matrices import matrices, sizes
from maxsep.parallel.collectives import Axes
from maxsep.parallel.layout import Layout

# By which letters matrices are split; key/value heads as the queries that need them. Routers are whole, and small.
SPLIT = {"dhq": "lh", "dkq": "lh", "dm": "lm", "edf": "lef", "vd": "v"}


class Kind(NamedTuple):
    """Matrices that are split alike, on one device."""

    letters: str  # of the dimensions that may be split; the vocabulary's are not in layers
    count: float  # weights of this device's layers, as it computes with them
    split: Axes  # mesh axes over which they are split where they are used
    stored: Axes  # further axes over which they are stored in parts

    @property
    def copied(self) -> Axes:
        """Mesh axes along which devices store the same."""
        return tuple(axis for axis in AXES if axis not in self.split + self.stored)


def kinds(config: Config, layout: Layout) -> list[Kind]:
    """All but norms and routers, which are small."""
    of, counts = sizes(config.model) | {"v": config.model.padded_vocab_size}, dict.fromkeys(SPLIT.values(), 0)
    for matrix in matrices(config.model):
        if matrix.letters in SPLIT:
            counts[SPLIT[matrix.letters]] += matrix.size(of)
    found = []
    for letters, count in counts.items():
        split = tuple(axis for letter in letters for axis in layout.axes(letter))
        stored = tuple(axis for axis in layout.axes("w") if axis not in split)
        found.append(Kind(letters, count / math.prod(map(layout.ways, letters)), split, stored))
    return found


def bytes_on_device(config: Config, training: bool) -> float:
    """The least that a device holds: weights; in training also their gradients and moments."""
    layout = Layout.of(config, "cpu")
    if not training:
        layout = layout.for_inference()
    sizes = dict(zip(AXES, layout.sizes, strict=True))
    size = {"float64": 8, "bfloat16": 4 if training else 2}.get(config.model.dtype, 4)  # of a weight
    total = 0.0
    for kind in kinds(config, layout):
        held = kind.count / math.prod(sizes[axis] for axis in kind.stored)
        copies = math.prod(sizes[axis] for axis in kind.copied) if config.optimizer.zero1 else 1
        total += held * size * (2 + 2 / copies if training else 1)
    return total
