"""One saved step: its arrays, and the record beside them that tells what they have to be.

Orbax notices that a file is missing or cut short, but hands over flipped bits as they are. So the record has the
fingerprint of every array, computed on the devices when it was saved, and a checksum of itself.

It is read without Orbax's manager, whose processes wait for each other: where one cannot read its part, all may agree
on another step.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from maxsep.cluster.job import ALONE, Job
from maxsep.config import ConfigError
from maxsep.config.checksum import checksum
from maxsep.output import tree
from maxsep.output.console import say
from maxsep.output.fingerprint import fingerprints

# Replicas share the writing of an array from this size on, in bytes. Each slice is compiled once for every device, at
# the first save: for small arrays that took 2.2 s of a 16-device run, and saved nothing.
SHARED_WRITE_BYTES = 64 * 2**20
STATE, RECORD = "state", "data"  # folders of a step
AT_ONCE_BYTES = 2**30  # of arrays that are read to be cast
FILE_BYTES = 2**26  # of a data file: what is written is held in memory, compressed, until one is full

Shapes = dict[tuple[str, ...], jax.ShapeDtypeStruct]  # with a NamedSharding, of any mesh, as each; by path
Arrays = dict[tuple[str, ...], jax.Array]


class Damaged(Exception):
    """What a step has on disk is not what was saved; the message says what, in one line."""


class Leaf(NamedTuple):
    """What an array of the state has to be."""

    dtype: str
    shape: list[int]
    fingerprint: int | None = None  # None: saved by a version that made none

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Record:
    """What is kept beside the arrays."""

    step: int
    data: dict  # JSON values of the caller's: where the data pipeline stands
    eval_loss: float | None  # nats; None: not evaluated at this step
    state: dict[str, Leaf]  # by name; empty where an older version has saved the step: nothing is known then

    @classmethod
    def of(cls, step: int, data: dict, eval_loss: float | None, arrays: dict[str, jax.Array]) -> tuple["Record", list]:
        """The record of a state, and the names of the arrays with entries that are not finite."""
        bits, infinite = fingerprints(arrays)
        leaves = {name: Leaf(x.dtype.name, list(x.shape), bits[name]) for name, x in arrays.items()}
        return cls(step, data, eval_loss, leaves), infinite

    def to_json(self) -> dict:
        content = {"step": self.step, "data": self.data, "eval_loss": self.eval_loss, "state": self.state}
        content = json.loads(json.dumps(content))
        return content | {"checksum": checksum(content)}

    @classmethod
    def from_json(cls, step: int, content: dict, old_loss: Callable[[], float | None]) -> "Record":
        """The record that `to_json` made; `old_loss` is that of one which an older version has made.

        Raises:
            Damaged: it is not, or not of this step.
        """
        if set(content) == {"position"}:  # by a version without fingerprints
            return cls(step, content, old_loss(), {})
        if content.pop("checksum", None) != checksum(content):
            raise Damaged("its record does not have the checksum that it was saved with")
        if content["step"] != step:
            raise Damaged(f"it is the step {content['step']}")
        leaves = {name: Leaf(*values) for name, values in content["state"].items()}
        return cls(step, content["data"], content["eval_loss"], leaves)


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's reader and writer of the arrays."""
    arrays = type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED_WRITE_BYTES)
    registry = type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class SavedStep:
    """A step in its folder, named by its number; `job` are the processes that read it together."""

    def __init__(self, folder: Path, job: Job = ALONE):
        self.folder, self.step, self.job = folder, int(folder.name), job
        self._arrays = array_handler()

    @functools.cached_property
    def record(self) -> Record:
        """What is kept beside the arrays.

        Raises:
            Damaged: it cannot be read, or has changed.
        """
        try:
            content = json.loads((self.folder / RECORD / "metadata").read_bytes())
        except (OSError, ValueError) as e:
            raise Damaged(f"its record cannot be read: {one_line(e)}") from e
        if not isinstance(content, dict):
            raise Damaged("its record is none")
        return Record.from_json(self.step, content, self._old_loss)

    def _old_loss(self) -> float | None:
        """The loss as Orbax's own file has it."""
        try:
            return float(json.loads((self.folder / "metrics" / "metrics").read_bytes())["eval_loss"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def whole(self, wanted: Shapes, within: tuple[str, ...] = (), cast: bool = False) -> tuple[Arrays, dict]:
        """The arrays under `within` that are wanted, by path, and the data beside them; compared with what was saved.

        Args:
            wanted: shapes, dtypes and shardings.
            cast: the dtypes may be others than those that were saved.

        Raises:
            ConfigError: another model was saved.
            Damaged: they are not as they were saved; in all processes.
        """
        out: Arrays = {}
        for part in self._alike(lambda: self.parts(wanted, within, cast)):
            # Without it arrays of 64 bits that are to be cast would be read as of 32.
            with jax.enable_x64(jax.config.jax_enable_x64 or any(x.dtype.itemsize == 8 for x in part.values())):
                arrays = self._alike(lambda part=part: self.read(part))
                self.compare(arrays)
                while arrays:  # one after the other, which frees what was read
                    path, array = arrays.popitem()
                    out[path] = array.astype(wanted[path].dtype)
        if not self.record.state:
            say(f"checkpoint of step {self.step} is of a version without fingerprints: damage would not be noticed")
        return out, self.record.data

    def _alike(self, part: Callable):
        """What `part` returns, if nothing is damaged in any process."""
        found, error = None, None
        try:
            found = part()
        except Damaged as e:
            error = str(e)
        for member, other in zip(self.job.members, self.job.agree(error), strict=True):
            if other is not None:
                raise Damaged(other if self.job.count == 1 else f"{other} ({member})")
        return found

    def parts(self, wanted: Shapes, within: tuple[str, ...] = (), cast: bool = False) -> list[Shapes]:
        """What to read of the arrays under `within` for the shapes and shardings that are wanted, as it was saved.

        All at once; with `cast`, where the wanted dtypes may be others, in parts, so that the arrays in both types do
        not take memory together.

        Raises:
            ConfigError: another model was saved.
            Damaged: it cannot be read, or has changed.
        """
        saved = self._check(wanted, within, cast)
        shapes = {
            path: jax.ShapeDtypeStruct(x.shape, saved[path].dtype, sharding=x.sharding) for path, x in wanted.items()
        }
        return _groups(shapes) if cast else [shapes]

    def read(self, shapes: Shapes) -> Arrays:
        """The arrays of a part, straight into their shardings.

        Raises:
            Damaged: they cannot be read.
        """
        # Without a sharding in every leaf Orbax would take the mesh the checkpoint was saved on.
        assert all(isinstance(x.sharding, jax.sharding.NamedSharding) for x in shapes.values())
        wanted = tree.nested(shapes)
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        try:
            return tree.named(self._arrays.restore(self.folder / STATE, args=args))
        except Exception as e:
            raise Damaged(f"it cannot be read: {one_line(e)}") from e

    def compare(self, arrays: Arrays) -> None:
        """Compares what was read with what was saved; in all processes alike.

        Raises:
            Damaged: it is not the same.
        """
        recorded = self.record.state
        bits, _ = fingerprints({".".join(path): array for path, array in arrays.items()} if recorded else {})
        other = [name for name, value in bits.items() if recorded[name].fingerprint != value]
        if other:
            more = f", and {len(other) - 1} more" if len(other) > 1 else ""
            raise Damaged(f"{other[0]}{more}: not the bits that were saved")

    def _check(self, wanted: Shapes, within: tuple[str, ...], cast: bool) -> dict[tuple[str, ...], Leaf]:
        """What was saved. Refuses what Orbax would cast in silence, or complain of in hundreds of lines."""
        try:
            metadata = tree.named(self._arrays.metadata(self.folder / STATE).tree)
            stored = {path: Leaf(np.dtype(x.dtype).name, list(x.shape)) for path, x in metadata.items()}
        except Exception as e:
            raise Damaged(f"it cannot be read: {one_line(e)}") from e
        if recorded := self.record.state:
            saved = {tuple(name.split(".")): leaf for name, leaf in recorded.items()}
            if {path: str(leaf) for path, leaf in saved.items()} != {path: str(leaf) for path, leaf in stored.items()}:
                raise Damaged("its arrays are not those that were saved")
        else:
            saved = stored
        saved = {path: leaf for path, leaf in saved.items() if path[: len(within)] == within}
        for path in sorted(saved.keys() | wanted.keys()):
            have = str(saved.get(path, "missing"))
            want = str(Leaf(wanted[path].dtype.name, list(wanted[path].shape))) if path in wanted else "missing"
            same = path in saved and path in wanted and list(wanted[path].shape) == list(saved[path].shape)
            if have != want and not (cast and same):
                where = f"checkpoint of step {self.step} in {self.folder.parent}"
                raise ConfigError(f"{where}: {'.'.join(path)} is {have} there and {want} in this model")
        return saved


def _groups(shapes: Shapes) -> list[Shapes]:
    """Parts of `AT_ONCE_BYTES` at most, or of one array."""
    groups: list[Shapes] = [{}]
    size = 0
    for path, x in shapes.items():
        count = x.size * x.dtype.itemsize
        if groups[-1] and size + count > AT_ONCE_BYTES:
            groups.append({})
            size = 0
        groups[-1][path] = x
        size += count
    return groups


def one_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:300]}"
