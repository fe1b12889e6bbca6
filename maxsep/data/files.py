"""Files of text as bytes, compressed or not: opening them, finding where they may be cut, and reading a stretch."""

import builtins
import bz2
import contextlib
import gzip
import hashlib
import itertools
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from maxsep.config import ConfigError

BLOCK = 1 << 20  # bytes read at once
PIECE = 16 << 20  # bytes, roughly, between the places where a file may be cut


# Where a file may be cut: the bytes before, roughly, and the lines, sections, row groups, documents or ids.
Cuts = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Scan:
    """What one reading of a file finds: its hash, and where it may be cut into pieces."""

    sha256: str
    cuts: Cuts  # from (0, 0) to the size and all lines


@dataclass(frozen=True)
class Part:
    """A stretch of a file, from the first of its cuts to the last."""

    path: str
    cuts: Cuts


def compression(path: str) -> str | None:
    """gz, xz, bz2, zst, or None."""
    ending = path.rpartition(".")[2]
    return ending if ending in ("gz", "xz", "bz2", "zst") else None


def state(path: str) -> str:
    """What changes when the file does.

    Raises:
        ConfigError: it is there no more.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"


def check(path: str) -> None:
    """Opens the file.

    Raises:
        ConfigError: it is a link to nothing, or this user may not read it.
    """
    try:
        open(path, "rb").close()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: OSError) -> ConfigError:
    takes = "files that this user may read"
    return ConfigError(f"data.path: {path!r} cannot be read ({error.strerror}); takes {takes}")


def scan(path: str) -> Scan:
    """Reads the whole file.

    Raises:
        ConfigError: a file that cannot be read to its end.
    """
    digest, cuts = hashlib.sha256(), [(0, 0)]
    size = lines = 0
    with opened(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if size + len(block) - cuts[-1][0] > PIECE:
                newline = block.rfind(b"\n")
                if newline >= 0:
                    cuts.append((size + newline + 1, lines + block.count(b"\n")))
            size += len(block)
            lines += block.count(b"\n")
    if cuts[-1][0] < size:
        cuts.append((size, lines))
    return Scan(digest.hexdigest(), tuple(cuts))


def read_pieces(path: str, cuts: Cuts) -> Iterator[bytes]:
    """The bytes between each two cuts that follow one another.

    Raises:
        ConfigError: a file that cannot be read to its end, or is not as it was scanned.
    """
    with opened(path, cuts[0][0]) as file:
        for (start, _), (stop, _) in itertools.pairwise(cuts):
            piece = file.read(stop - start)
            if len(piece) != stop - start:
                raise ConfigError(f"data.path: {path!r} changed while it was read")
            yield piece


@contextlib.contextmanager
def opened(path: str, offset: int = 0) -> Iterator[BinaryIO]:
    """The file's text from an offset on; what a damaged file raises becomes the user's one line."""
    try:
        with _decompress(path) as file:
            if compression(path):
                while offset and (block := file.read(min(offset, BLOCK))):
                    offset -= len(block)
            else:
                file.seek(offset)
            yield file
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"data.path: {path!r} cannot be read to its end: {error}") from None


def _decompress(path: str) -> BinaryIO:
    how = compression(path)
    if how == "zst":  # not in the standard library before Python 3.14
        import pyarrow

        return pyarrow.input_stream(path, compression="zstd")
    return {None: builtins, "gz": gzip, "xz": lzma, "bz2": bz2}[how].open(path, "rb")
