"""Collectives on this machine's devices: what each device must receive is known, and what is wrong names two devices.

Device d sends numbers of which each says where it is from: d × size + place. Of sums each part has a factor of its own,
(d + 1) × (1 + place mod 7), so that what is missing, or there twice, tells whose it was.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from maxsep.certification.check import Check
from maxsep.config.layouts import AXES
from maxsep.parallel import collectives

PART = "collectives"
SIZES = (1, 2**10, 2**16)  # numbers that a device gives, or the next multiple of its group's devices
MOVED, ADDED = "moved", "added"


class Pattern(NamedTuple):
    """A function of `collectives`: what it takes, does, and must give."""

    name: str
    takes: str  # MOVED: a device's own numbers, ADDED: its part of a sum
    call: Callable  # what a device gives -> what it gets
    expected: Callable[[np.ndarray, int], np.ndarray]  # what all of the group give [P, n], and a place in it


def patterns(axes: tuple[str, ...]) -> list[Pattern]:
    """Those of `axes`, along which a group of P devices lies."""

    def parts(of_pn: np.ndarray) -> np.ndarray:
        return of_pn.reshape(len(of_pn), len(of_pn), -1)

    return [
        Pattern("gather", MOVED, lambda x: collectives.gather(x, axes, 0), lambda of, at: of.ravel()),
        Pattern("gather_weight", MOVED, lambda x: collectives.gather_weight(x, x, axes, 0), lambda of, at: of.ravel()),
        Pattern(
            "exchange", MOVED, lambda x: collectives.exchange(x, axes, 0, 0), lambda of, at: parts(of)[:, at].ravel()
        ),
        Pattern("shift", MOVED, lambda x: collectives.shift(x, axes), lambda of, at: of[at - 1] if at else 0 * of[0]),
        Pattern("largest", MOVED, lambda x: collectives.largest(x, axes), lambda of, at: of.max(axis=0)),
        Pattern("total", ADDED, lambda x: collectives.total(x, axes), lambda of, at: of.sum(axis=0)),
        Pattern(
            "reduce_scatter",
            ADDED,
            lambda x: collectives.reduce_scatter(x, axes, 0),
            lambda of, at: parts(of)[:, at].sum(axis=0),
        ),
    ]


def checks(mesh: Mesh, name: str) -> Iterator[Check]:
    """Each pattern along each axis of `mesh`, and along all at once; of what this process's devices have received."""
    long = tuple(axis for axis in AXES if mesh.shape[axis] > 1)
    for axes in dict.fromkeys([*((axis,) for axis in long), long]):
        members = math.prod(mesh.shape[axis] for axis in axes)
        of_axes = patterns(axes)
        quantities = {pattern.name: f"{pattern.name}, {' and '.join(axes)}" for pattern in of_axes}
        found = {quantity: Check(PART, name, quantity, 0.0, "", 0.0) for quantity in quantities.values()}
        for size in (-(-size // members) * members for size in SIZES):
            for pattern, received in zip(of_axes, _received(mesh, of_axes, size), strict=True):
                for shard in received.addressable_shards:
                    at = tuple(part.start or 0 for part in shard.index[: len(AXES)])
                    wrong = _wrong(pattern, _group(mesh, axes, at), at, np.asarray(shard.data).ravel(), size)
                    if wrong and found[quantity := quantities[pattern.name]].passed:
                        found[quantity] = Check(PART, name, quantity, 1.0, f"{wrong}, of {size}", 0.0)
        yield from found.values()


def _received(mesh: Mesh, of_axes: Sequence[Pattern], size: int) -> list[jax.Array]:
    """What each device has after each pattern, [stage, attention, expert, numbers]."""

    def on_device():
        device, place = collectives.index(AXES), jnp.arange(size, dtype=jnp.int32)
        given = {MOVED: device * size + place, ADDED: (device + 1) * (1 + place % 7)}
        out = []
        for pattern in of_axes:
            # One after the other: simulated devices hang where each runs another one first.
            x, out = jax.lax.optimization_barrier((collectives.vary(given[pattern.takes]), out))
            out.append(collectives.vary(pattern.call(x))[None, None, None])
        return out

    with jax.set_mesh(mesh):
        return jax.jit(jax.shard_map(on_device, in_specs=(), out_specs=P(*AXES)))()


def _group(mesh: Mesh, axes: Sequence[str], at: tuple[int, ...]) -> dict[tuple[int, ...], int]:
    """The devices that lie along `axes` with the one at the place `at`, in their order: place and number."""
    sizes = [mesh.shape[axis] for axis in AXES]
    free = [size if axis in axes else 1 for axis, size in zip(AXES, sizes, strict=True)]
    fixed = [0 if axis in axes else place for axis, place in zip(AXES, at, strict=True)]
    places = (tuple(map(sum, zip(fixed, member, strict=True))) for member in np.ndindex(*free))
    return {place: int(np.ravel_multi_index(place, sizes)) for place in places}


def _wrong(pattern: Pattern, group: dict[tuple[int, ...], int], at: tuple[int, ...], got: np.ndarray, size: int) -> str:
    """Which device has a wrong number of which other one; "" where none is wrong.

    Args:
        pattern: what was called.
        group: of `_group`.
        at: the place of the device that has received `got`.
        size: numbers that each has given.
    """
    own, place = list(group).index(at), np.arange(size, dtype=np.int32)
    numbers = np.array([*group.values()], np.int32)[:, None]
    given = numbers * size + place if pattern.takes == MOVED else (numbers + 1) * (1 + place % 7)
    expected = pattern.expected(given, own).ravel()
    if got.shape == expected.shape and (got == expected).all():
        return ""
    here = _device(at)
    if got.shape != expected.shape:
        return f"{here} has {got.size} numbers of {expected.size}"
    first = int(np.flatnonzero(got != expected)[0])

    def named(number: int) -> str:
        places = [place for place, other in group.items() if other == number]
        return _device(places[0]) if places else "no device of its group"

    if pattern.takes == MOVED:
        has, source = (named(int(of[first]) // size) for of in (got, expected))
        return f"{here} has a number of {has}, where one of {source} belongs"
    given_at = first + (own * (size // len(group)) if pattern.name == "reduce_scatter" else 0)
    times = (int(got[first]) - int(expected[first])) / (1 + given_at % 7)
    how = "lacks" if times < 0 else "has twice"
    return f"{here} {how} a number of {named(int(abs(times)) - 1 if times == int(times) else -1)}"


def _device(place: Sequence[int]) -> str:
    """As `device 0x1x3`: its place on the mesh's axes."""
    return f"device {'x'.join(map(str, place))}"
