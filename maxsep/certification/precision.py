"""One step in the run's type beside float64: what the type loses on a layout, and on one device.

The bound is measured: `FACTOR` times what a step on one device loses in that type, the most of several batches, whose
rows and micro-batches are put in another order than float64 has them in. One batch would not do: what a mean over
tokens loses may cancel out by chance, and another order alone rounds each row as before.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from maxsep.certification.check import Check, worst_of
from maxsep.certification.differences import by_leaf, difference
from maxsep.certification.evidence import batches, figures
from maxsep.certification.rig import Rig, alone, on_host
from maxsep.config import Config, runs

PART, REPEATS = "dtype", "repeats"
FACTOR, BATCHES = 4, 8
FLOOR = 4 * float(np.finfo(np.float32).eps)  # figures are float32: their rounding may be less on one device by chance
COUNTED = ("choices per expert", "dropped choices")  # the same in any type, as all experts are chosen


class Reference:
    """A first step on one device: in float64, and what the run's type loses there.

    Args:
        own: a config in the run's type.
    """

    def __init__(self, own: Config):
        lone = Rig(alone(own))
        self.start, records = on_host(lone.new_state()), batches(own, BATCHES)
        self.batch, rng = records[0], np.random.default_rng(4)
        with jax.enable_x64(True):
            wide = Rig(alone(exactly(own)), jax.local_devices(backend="cpu")[0])
            expected = [_compared(wide, *self.step(wide, batch)) for batch in records]
        self.expected = expected[0]
        losses = [
            apart(_compared(lone, *self.step(lone, permuted(batch, rng))), of)
            for batch, of in zip(records, expected, strict=True)
        ]
        self.lost = {
            quantity: {leaf: max(one[quantity][leaf] for one in losses) for leaf in leaves}
            for quantity, leaves in losses[0].items()
        }

    def step(self, rig: Rig, batch: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
        """The first step: the state after it and its figures, on the host."""
        state, found = rig.train(rig.placed(self.start), batch)
        return on_host(state), found


def apart(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The differences, by quantity and leaf."""
    return {quantity: by_leaf(got, expected[quantity], quantity) for quantity, got in found.items()}


def exactly(own: Config) -> Config:
    """The same in float64."""
    return replace(own, model=replace(own.model, dtype="float64", float32_precision="highest", attention_kernel="xla"))


def checks(reference: Reference, rig: Rig) -> Iterator[Check]:
    """The first step of a layout, twice: beside float64, and beside itself."""
    run = runs.name(rig.config.layout, rig.config.mesh)
    first, again = (reference.step(rig, reference.batch) for _ in range(2))
    for quantity, leaves in apart(_compared(rig, *first), reference.expected).items():
        bounds = {leaf: max(FLOOR, FACTOR * lost) for leaf, lost in reference.lost[quantity].items()}
        yield worst_of(Check(PART, run, quantity, lost, leaf, bounds[leaf]) for leaf, lost in leaves.items())
    for quantity, one, other in zip(("state", "figures"), first, again, strict=True):
        yield worst_of(Check(REPEATS, run, quantity, *of_leaf, 0.0) for of_leaf in bits(one, other, quantity))


def _compared(rig: Rig, state: Any, found: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: of for name, of in figures(rig.config, state, found).items() if name not in COUNTED}


def bits(one: Any, other: Any, quantity: str) -> Iterator[tuple[float, str]]:
    """Of each leaf the difference and its name; it is 0 only where all bits are the same."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (path, x), y in pairs:
        differs = 0.0 if x.tobytes() == y.tobytes() else max(difference(x, y), 5e-324)
        yield differs, jax.tree_util.keystr(path) or quantity


def permuted(batch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The batch with its micro-batches, and the rows of each, in another order: sums are the same."""
    return np.stack([rows[rng.permutation(len(rows))] for rows in batch[rng.permutation(len(batch))]])
