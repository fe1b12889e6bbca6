"""One saved step, read: its arrays, compared with the record beside them (record.py).

What cannot be read is waited for, as a disk or a network may come back. Then it is damage only if a fingerprint or a
checksum is wrong, or a file is missing or short; anything else says nothing about the step, and ends the job.

It is read without Orbax's manager, whose processes wait for each other: where one cannot read its part, all may agree
on another step.
"""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from maxsep.cluster.job import ALONE, Job
from maxsep.config import ConfigError, cli, faults
from maxsep.output import tree
from maxsep.output.console import say
from maxsep.output.fingerprint import fingerprints
from maxsep.output.record import STATE, Damaged, Incomplete, Leaf, Record

# Replicas share the writing of an array from this size on, in bytes. Each slice is compiled once for every device, at
# the first save: for small arrays that took 2.2 s of a 16-device run, and saved nothing.
SHARED_WRITE_BYTES = 64 * 2**20
AT_ONCE_BYTES = 2**30  # of arrays that are read to be cast
FILE_BYTES = 2**26  # of a data file: what is written is held in memory, compressed, until one is full

# How TensorStore says that an array's own bytes cannot be decoded: of these the record has no checksum.
UNDECODABLE = re.compile(r"\b(DATA_LOSS|FAILED_PRECONDITION|OUT_OF_RANGE): ")
FILES = re.compile(r'(?:local file|open:) "([^"]+)"|open file (.+?): ')  # as TensorStore names them
# What a process says of a part that it could not read; of several, the first of these counts.
KINDS = (ConfigError, cli.Exit, Damaged, Incomplete)

Shapes = dict[tuple[str, ...], jax.ShapeDtypeStruct]  # with a NamedSharding, of any mesh, as each; by path
Arrays = dict[tuple[str, ...], jax.Array]


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
            Damaged, Incomplete: it has changed, or is missing.
            OSError: it cannot be read.
        """
        return Record.read(self.folder)

    def whole(self, wanted: Shapes, fields: tuple[str, ...] = (), cast: bool = False) -> tuple[Arrays, dict]:
        """The arrays that are wanted, by path, and the data beside them; compared with what was saved.

        Args:
            wanted: shapes, dtypes and shardings.
            fields: of the state, of which all are wanted; (): of the whole state.
            cast: the dtypes may be others than those that were saved.

        Raises:
            Damaged: they are not as they were saved; in all processes.
            ConfigError: another model was saved, or this user may not read it.
            cli.Exit: some process cannot read it, which says nothing about the step.
        """
        out: Arrays = {}
        for part in self._alike(lambda: self.parts(wanted, fields, cast)):
            # Without it arrays of 64 bits that are to be cast would be read as of 32.
            with jax.enable_x64(jax.config.jax_enable_x64 or any(x.dtype.itemsize == 8 for x in part.values())):
                arrays = self._alike(lambda part=part: self.read(part))
                self.compare(arrays)
                while arrays:  # one after the other, which frees what was read
                    path, array = arrays.popitem()
                    out[path] = array.astype(wanted[path].dtype)
        return out, self.record.data

    def _alike(self, part: Callable):
        """What `part` returns, if all processes of the job can read; it may be called again.

        Raises:
            as `whole`; in all processes the same.
        """
        found = error = None
        try:
            found = faults.retried(part, (ConfigError, Damaged), self._told)
        except Exception as e:
            error = self._judged(e)
        said = self.job.agree(error and [KINDS.index(type(error)), str(error)])
        failed = [answer for answer in said if answer is not None]
        if not failed:
            return found
        kind, line = worst = min(failed)
        if said.count(worst) < len(said):
            line = f"{line} ({self.job.members[said.index(worst)]})"
        # What is missing for one process of many may only be late there: the first looks too.
        if KINDS[kind] is Incomplete and self.job.agree(self.job.first and self._incomplete())[0]:
            raise Damaged(line)
        if KINDS[kind] in (Incomplete, cli.Exit):
            raise cli.Exit(cli.RESTART, f"{self} cannot be read: {line}; nothing was changed")
        raise KINDS[kind](line)

    def _judged(self, error: Exception) -> Exception:
        """What an error says about the step, as one of `KINDS`."""
        if isinstance(error, ConfigError | Damaged):
            return error
        wrong = None
        if faults.number(error) not in faults.RIGHTS | faults.WORLD:
            try:
                wrong = self.record.wrong_file(self.folder)
            except (Damaged, Incomplete) as e:
                wrong = e
            except Exception as e:  # the record cannot be read either
                error = e
        code, line = faults.number(error), one_line(error)
        if wrong is not None:
            return wrong
        if code in faults.RIGHTS:
            return ConfigError(f"{self} cannot be read: {line}; takes one that this user may read")
        if code is None and any(UNDECODABLE.search(str(e)) for e in faults.chain(error)):
            return Damaged(line)
        return cli.Exit(cli.RESTART, line)

    def _incomplete(self) -> bool:
        """Whether a file is missing or short as this process sees it."""
        try:
            return isinstance(Record.read(self.folder).wrong_file(self.folder), Incomplete)
        except Incomplete:
            return True

    def _told(self, error: Exception) -> None:
        say(f"warning: {self} cannot be read: {self._judged(error)}; trying again for {faults.RETRY_SECONDS:g} s")

    def __str__(self) -> str:
        return f"checkpoint of step {self.step} in {self.folder.parent}"

    def parts(self, wanted: Shapes, fields: tuple[str, ...] = (), cast: bool = False) -> list[Shapes]:
        """What to read for the shapes and shardings that are wanted, as it was saved.

        All at once; with `cast`, where the wanted dtypes may be others, in parts, so that the arrays in both types do
        not take memory together.

        Raises:
            ConfigError: another model was saved.
            Damaged: it has changed. And whatever keeps it from being read.
        """
        saved = self._check(wanted, fields, cast)
        shapes = {
            path: jax.ShapeDtypeStruct(x.shape, saved[path].dtype, sharding=x.sharding) for path, x in wanted.items()
        }
        return _groups(shapes) if cast else [shapes]

    def read(self, shapes: Shapes) -> Arrays:
        """The arrays of a part, straight into their shardings. Raises whatever keeps them from being read."""
        # Without a sharding in every leaf Orbax would take the mesh the checkpoint was saved on.
        assert all(isinstance(x.sharding, jax.sharding.NamedSharding) for x in shapes.values())
        wanted = tree.nested(shapes)
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        return tree.named(self._arrays.restore(self.folder / STATE, args=args))

    def compare(self, arrays: Arrays) -> None:
        """Compares what was read with what was saved; in all processes alike.

        Raises:
            Damaged: it is not the same.
        """
        recorded = self.record.state
        bits, _ = fingerprints({".".join(path): array for path, array in arrays.items()})
        other = [name for name, value in bits.items() if recorded[name].fingerprint != value]
        if other:
            more = f", and {len(other) - 1} more" if len(other) > 1 else ""
            raise Damaged(f"{other[0]}{more}: not the bits that were saved")

    def _check(self, wanted: Shapes, fields: tuple[str, ...], cast: bool) -> dict[tuple[str, ...], Leaf]:
        """What was saved. Refuses what Orbax would cast in silence, or complain of in hundreds of lines."""
        saved = {tuple(name.split(".")): leaf for name, leaf in self.record.state.items()}
        metadata = tree.named(self._arrays.metadata(self.folder / STATE).tree)
        stored = {path: str(Leaf(np.dtype(x.dtype).name, list(x.shape))) for path, x in metadata.items()}
        if {path: str(leaf) for path, leaf in saved.items()} != stored:
            raise Damaged("its arrays are not those that were saved")
        saved = {path: leaf for path, leaf in saved.items() if not fields or path[0] in fields}
        for path in sorted(saved.keys() | wanted.keys()):
            have = str(saved.get(path, "missing"))
            want = str(Leaf(wanted[path].dtype.name, list(wanted[path].shape))) if path in wanted else "missing"
            same = path in saved and path in wanted and list(wanted[path].shape) == list(saved[path].shape)
            if have != want and not (cast and same):
                raise ConfigError(f"{self}: {'.'.join(path)} is {have} there and {want} in this model")
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
    """An error of a library, for people: what it was raised from, with the file if the system refused one."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split())
    code, files = faults.number(cause), FILES.findall(text)
    if code is not None and files:  # TensorStore names what it was at from the outside to the inside
        return f"{''.join(files[-1])}: {os.strerror(code)}"
    return f"{type(cause).__name__}: {text[:300]}"
