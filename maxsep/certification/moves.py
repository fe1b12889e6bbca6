"""Checkpoints that move: saved on each layout, restored on the next one, in a ring."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxsep.certification.check import Check, worst_of
from maxsep.certification.differences import by_leaf, difference
from maxsep.certification.evidence import TOLERANCE, batches
from maxsep.certification.rig import Rig, on_host
from maxsep.cluster.job import ALONE, Job
from maxsep.config import runs
from maxsep.output import tree
from maxsep.output.checkpoint import Checkpoints
from maxsep.output.fingerprint import fingerprints

PART, STEP = "moves", 1


def checks(trained: Sequence[tuple[Rig, Any]], folder: Path, job: Job = ALONE) -> Iterator[Check]:
    """The moves of every layout's state to the next one, named by where it goes to and comes from.

    Args:
        trained: of each layout its rig, and a state on the host.
        folder: an empty one that all processes of the job share.
    """
    batch, saved = batches(trained[0][0].config, 1)[0], []
    for number, (rig, start) in enumerate(trained):
        state = rig.placed(start)
        with jax.set_mesh(rig.mesh):
            bits = _fingerprints(state)
            with Checkpoints(folder / str(number), job=job) as checkpoints:
                checkpoints.save(STEP, state, {})
        saved.append((bits, start, *_next(rig, state, batch)))
    for number, (rig, _) in enumerate(trained):
        before = (number - 1) % len(trained)
        bits, state, after, loss = saved[before]
        with jax.set_mesh(rig.mesh):
            with Checkpoints(folder / str(before), read_only=True, job=job) as checkpoints:
                restored = checkpoints.restore(rig.run.abstract_state).state
            differ = [name for name, found in _fingerprints(restored).items() if found != bits[name]]
        source, here = (runs.name(of.config.layout, of.config.mesh) for of in (trained[before][0], rig))

        def check(quantity: str, found: float, worst: str, tolerance: float, source=source, here=here) -> Check:
            return Check(PART, here, quantity, found, f"{worst}, from {source}", tolerance)

        yield check("fingerprints", float(len(differ)), differ[0] if differ else "none", 0.0)
        yield worst_of(
            check("restored state", share, leaf, 0.0)
            for leaf, share in by_leaf(on_host(restored), state, "state").items()
        )
        found, its_loss = _next(rig, restored, batch)
        yield check("next loss", difference(its_loss, loss), "loss", TOLERANCE)
        yield worst_of(
            check("next state", share, leaf, TOLERANCE) for leaf, share in by_leaf(found, after, "state").items()
        )


def _next(rig: Rig, state: Any, batch: np.ndarray) -> tuple[Any, np.ndarray]:
    """The state after one more step, and its loss."""
    state, figures = rig.train(state, batch)
    return on_host(state), figures["loss"]


def _fingerprints(state: Any) -> dict[str, int]:
    found, _ = fingerprints({".".join(path): array for path, array in tree.named(state).items()})
    return found
