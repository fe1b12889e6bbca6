"""The files that a glob means: each once, and none left out without a word."""

import functools
import glob
import os
from collections.abc import Iterator
from stat import S_ISLNK

from maxsep.config import ConfigError


def matching(pattern: str) -> list[str]:
    """The files, in the order of their names. A file that goes by several names or links is there once.

    Raises:
        ConfigError: a folder that may hold some cannot be read.
    """
    pattern = os.path.expanduser(pattern)
    for folder, listed in _folders(pattern):
        real = os.path.realpath(folder)
        try:
            os.stat(os.path.join(real, os.curdir))
            if listed:
                os.scandir(real).close()
        except PermissionError:
            got = f"got {pattern!r}, where the folder {folder!r} cannot be read"
            raise ConfigError(f"data.path: {got}; takes folders that this user may read") from None
    found = {}
    _real.cache_clear()
    # The shortest name of each: a link to a folder above it has ever longer ones.
    for path in sorted(glob.glob(pattern, recursive=True), key=lambda path: (len(path), path)):
        found.setdefault(_identity(path), path)
    return sorted(found.values())


def _identity(path: str) -> object:
    """The same for all names of a file."""
    try:
        stat = os.lstat(path)
        if S_ISLNK(stat.st_mode):
            real = os.path.realpath(path)
            stat = os.stat(real)
        else:
            real = os.path.join(_real(os.path.dirname(path)), os.path.basename(path))
    except OSError:  # too many links on the way, or one to nothing
        return os.path.realpath(path)
    # Not every file system tells files apart by their number: where a file has one name, that says more.
    return (stat.st_dev, stat.st_ino) if stat.st_nlink > 1 else real


_real = functools.lru_cache(os.path.realpath)  # of a folder, for all files in it


def _folders(pattern: str) -> Iterator[tuple[str, bool]]:
    """The folders that `glob` looks into, and whether it lists them; it passes over those that it may not."""
    parts = pattern.split(os.sep)
    for number, part in enumerate(parts):
        above = os.sep.join(parts[: number + (part == "**")])
        place = above + os.sep if above or number else os.curdir
        for folder in glob.glob(place, recursive=True) if glob.has_magic(above) else [place]:
            if os.path.isdir(os.path.realpath(folder)):
                yield folder, glob.has_magic(part)
