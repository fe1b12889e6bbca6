"""What is kept beside the arrays of a saved step: where its data stands, and what its arrays and files have to be.

Orbax notices that a file is missing or cut short, but hands over flipped bits as they are. So the record has the
fingerprint of every array, computed on the devices when it was saved, the size of every file, a checksum of those that
say where the arrays lie, and one of itself. The loss of an evaluation comes later, in a file of its own.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

from maxsep.config import ConfigError
from maxsep.config.checksum import checksum, file_checksum
from maxsep.output.durable import finite, write_json
from maxsep.output.fingerprint import fingerprints

STATE, RECORD = "state", "data"  # folders of a step
FILE = "metadata"  # in the latter
EVALUATION = "evaluation.json"
PARTS = "ocdbt.process_"  # how folders of the state begin that have the arrays' own bytes, of which fingerprints tell
STATS = 16  # files at a time, as each may be a question to another machine


class Damaged(Exception):
    """What a step has on disk is not what was saved; the message says what, in one line."""


class Incomplete(Exception):
    """A file of a step is missing or short, as this process sees it now: that of another host may be seen late."""


class Leaf(NamedTuple):
    """What an array of the state has to be."""

    dtype: str
    shape: list[int]
    fingerprint: int | None = None

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class File(NamedTuple):
    """What a file of the state has to be."""

    bytes: int
    checksum: str | None  # SHA-256; None: of the arrays' own bytes


@dataclass(frozen=True)
class Record:
    """What is kept beside the arrays."""

    step: int
    data: dict  # JSON values of the caller's: where the data pipeline stands
    state: dict[str, Leaf]  # arrays, by name
    files: dict[str, File] = field(default_factory=dict)  # of the state, by path; empty until all are written

    @classmethod
    def of(cls, step: int, data: dict, arrays: dict[str, jax.Array]) -> tuple["Record", list]:
        """The record of a state, and the names of the arrays with entries that are not finite."""
        bits, infinite = fingerprints(arrays)
        leaves = {name: Leaf(x.dtype.name, list(x.shape), bits[name]) for name, x in arrays.items()}
        return cls(step, data, leaves), infinite

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """That of the step in `folder`, which is named by its number.

        Raises:
            Damaged: it is not as it was written, or of another step.
            Incomplete: it is missing, or cut short.
            ConfigError: it is of another version.
            OSError: it cannot be read.
        """
        content = _read(folder / RECORD / FILE, "its record")
        if content.keys() != {"step", "data", "state", "files"}:
            raise ConfigError(
                f"{folder} was saved by another version of maxsep, whose checkpoints this one does not read"
            )
        if content["step"] != int(folder.name):
            raise Damaged(f"it is the step {content['step']}")
        state = {name: Leaf(*leaf) for name, leaf in content["state"].items()}
        files = {name: File(*file) for name, file in content["files"].items()}
        return cls(content["step"], content["data"], state, files)

    def wrong_file(self, folder: Path) -> Damaged | Incomplete | None:
        """What is wrong with a file of the state of the step in `folder`, which is read as far as it has a checksum."""

        def wrong(name: str) -> Damaged | Incomplete | None:
            path, (size, check) = folder / STATE / name, self.files[name]
            try:
                found = path.stat().st_size
            except FileNotFoundError:
                return Incomplete(f"{path} is missing")
            if found != size:
                return Incomplete(f"{path} has {found} bytes, not {size}")
            if check is not None and check != file_checksum(path):
                return Damaged(f"{path} does not have the checksum that it was saved with")
            return None

        with ThreadPoolExecutor(STATS) as pool:
            return next((found for found in pool.map(wrong, self.files) if found), None)


class RecordHandler(ocp.JsonCheckpointHandler):
    """Orbax's writer of the record, which is finished when the state's files are: Orbax finalizes items in turn."""

    def finalize(self, directory: Path) -> None:
        path, state = Path(directory) / FILE, Path(directory).parent / STATE
        content = json.loads(path.read_bytes())
        files = [file for file in state.rglob("*") if file.is_file()]

        def file(path: Path) -> tuple[str, File]:
            name = str(path.relative_to(state))
            return name, File(path.stat().st_size, None if name.startswith(PARTS) else file_checksum(path))

        with ThreadPoolExecutor(STATS) as pool:
            _write(path, content | {"files": dict(pool.map(file, files))})


@ocp.args.register_with_handler(RecordHandler, for_save=True, for_restore=True)
@dataclass
class RecordSave(ocp.args.CheckpointArgs):
    """How a record is given to Orbax."""

    item: dict

    @classmethod
    def of(cls, record: Record) -> "RecordSave":
        return cls(asdict(record))


def write_loss(folder: Path, loss: float) -> None:
    """Keeps the held-out loss, in nats, of the step in `folder`, which is saved."""
    _write(folder / EVALUATION, {"eval_loss": loss})


def read_loss(folder: Path) -> float | None:
    """The held-out loss, in nats, of the step in `folder`; None: it has not been evaluated, or was not finite.

    Raises:
        Damaged: what is kept of it is not as it was written.
        OSError: it cannot be read.
    """
    if not (folder / EVALUATION).exists():
        return None
    return _read(folder / EVALUATION, "its evaluation")["eval_loss"]


def _write(path: Path, content: dict) -> None:
    content = json.loads(json.dumps(finite(content)))
    write_json(path, content | {"checksum": checksum(content)}, indent=None)


def _read(path: Path, what: str) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise Incomplete(f"{path} is missing") from e
    except ValueError as e:
        raise Incomplete(f"{what} cannot be read: {path} is not JSON ({e})") from e
    if not isinstance(content, dict) or content.pop("checksum", None) != checksum(content):
        raise Damaged(f"{what}, {path}, does not have the checksum that it was saved with")
    return content
