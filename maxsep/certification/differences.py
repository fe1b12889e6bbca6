"""How far apart two trees of numbers are."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from maxsep.certification.check import Check


def compared(
    part: str, run: str, found: dict[str, Any], reference: dict[str, Any], tolerance: float
) -> Iterator[Check]:
    """A check of each quantity of `found`: of a tree, of its worst leaf."""
    for quantity, got in found.items():
        differences = by_leaf(got, reference[quantity], quantity)
        worst = max(differences, key=differences.get)
        yield Check(part, run, quantity, differences[worst], worst, tolerance)


def by_leaf(got: Any, expected: Any, quantity: str) -> dict[str, float]:
    """The difference of each leaf of two trees of the same structure, by its name; a lone one has its quantity's."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    return {jax.tree_util.keystr(path) or quantity: difference(one, other) for (path, one), other in pairs}


def difference(one: Any, other: Any) -> float:
    """The largest, as a share of the reference's largest entry; infinite where a number is not finite."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.shape != other.shape or not np.isfinite(one).all() or not np.isfinite(other).all():
        return float("inf")
    if not one.size:
        return 0.0
    return float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-300))
