"""Files that a reader finds whole, the old one or the new, whenever the writer is killed."""

import contextlib
import errno
import json
import math
import os
import uuid
from pathlib import Path

from maxsep.config import cli, paths


def write_json(path: Path, values, indent: int | None = 2) -> None:
    """Replaces the file by `values` as strict JSON."""
    write_text(path, json_text(values, indent))


def json_text(values, indent: int | None = 2) -> str:
    """`values` as strict JSON: what is not finite becomes null."""
    return json.dumps(finite(values), indent=indent, allow_nan=False) + "\n"


def write_asked(flag: str, file: str, text: str) -> None:
    """Writes what `flag` has asked for to the file that it names; a link is followed, a device or pipe written to.

    Raises:
        cli.Exit: it cannot be written.
    """
    path = paths.to_write(flag, file)
    try:
        if paths.is_stream(path):
            with path.open("a", encoding="utf-8") as stream:
                stream.write(text)
        else:
            write_text(path, text)
    except OSError as e:
        raise cli.Exit(cli.SAVE_FAILED, f"{flag}: cannot write {file}: {e.strerror}") from e


def write_text(path: Path, text: str) -> None:
    """Replaces the file at once, or what a link leads to; it is on disk when this returns."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # several may write the same file
    try:
        with temporary.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class Appended:
    """A file that grows by whole pieces: what a full disk has cut short is taken back."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)

    def check(self) -> None:
        """Makes sure that it still is what its path names; where its folder is there again, it is made anew.

        Raises:
            OSError: it is not.
        """
        own = os.fstat(self._file.fileno())
        try:
            same = os.path.samestat(own, self._path.stat())
        except FileNotFoundError:
            same = False
        if not same:
            file = self._path.open("ab", buffering=0)
            self._file.close()
            self._file = file

    def append(self, piece: bytes) -> None:
        """Writes a piece, which is on disk when this returns.

        Raises:
            OSError: it is not, nor any of it.
        """
        if not piece:
            return
        self.check()
        descriptor = self._file.fileno()
        size = os.fstat(descriptor).st_size
        try:
            if self._file.write(piece) < len(piece):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise

    def close(self) -> None:
        self._file.close()


def finite(value):
    """`value` with None for every float that JSON cannot write."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
