"""The files that a glob means: each once, and none left out without a word."""

import glob
import os
from collections.abc import Iterator

from maxsep.config import ConfigError


def matching(pattern: str) -> list[str]:
    """The files, in the order of their names. A file that goes by several names or links is there once.

    Raises:
        ConfigError: a folder that may hold some cannot be read.
    """
    pattern = os.path.expanduser(pattern)
    for folder, mode in _folders(pattern):
        if not os.access(os.path.realpath(folder), mode):
            takes = "folders that this user may read"
            raise ConfigError(f"data.path: got {pattern!r}, where the folder {folder!r} cannot be read; takes {takes}")
    found = {}
    # The shortest name of each: a link to a folder above it has ever longer ones.
    for path in sorted(glob.glob(pattern, recursive=True), key=lambda path: (len(path), path)):
        found.setdefault(_identity(path), path)
    return sorted(found.values())


def _identity(path: str) -> object:
    """The same for all names of a file."""
    real = os.path.realpath(path)
    try:
        stat = os.stat(real)
    except OSError:
        return real
    # Not every file system tells files apart by their number: where a file has one name, that says more.
    return (stat.st_dev, stat.st_ino) if stat.st_nlink > 1 else real


def _folders(pattern: str) -> Iterator[tuple[str, int]]:
    """The folders that `glob` looks into, and how; it passes over one that it may not read."""
    parts = pattern.split(os.sep)
    for number, part in enumerate(parts):
        above = os.sep.join(parts[: number + (part == "**")])
        place = above + os.sep if above or number else os.curdir
        for folder in glob.glob(place, recursive=True) if glob.has_magic(above) else [place]:
            if os.path.isdir(os.path.realpath(folder)):
                yield folder, os.R_OK | os.X_OK if glob.has_magic(part) else os.X_OK
