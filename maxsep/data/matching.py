"""The files that a glob means: each once, and none left out without a word.

The standard library's `glob` passes over folders that it may not read, and follows links round in circles.
"""

import errno
import fnmatch
import functools
import glob
import itertools
import os
from collections.abc import Iterator
from stat import S_ISLNK

from maxsep.config import ConfigError, paths


def matching(pattern: str) -> list[str]:
    """The paths that match, in the order of their names. A file that goes by several names or links is there once.

    Raises:
        ConfigError: a folder that may hold some cannot be read.
    """
    paths.check_local("data.path", pattern)
    path = os.path.expanduser(pattern)
    parts = [part for part in path.split(os.sep) if part]
    parts = [part for part, following in itertools.zip_longest(parts, parts[1:]) if (part, following) != ("**", "**")]
    _real.cache_clear()  # a link may lead elsewhere by now
    found = {}
    try:
        matches = list(_matches(os.sep if os.path.isabs(path) else "", parts))
    except PermissionError as error:
        got = f"got {pattern!r}, where the folder {error.filename!r} cannot be read"
        raise ConfigError(f"data.path: {got}; takes folders that this user may read") from None
    for path in sorted(matches, key=lambda path: (len(path), path)):  # of several names the shortest
        found.setdefault(_identity(path), path)
    return sorted(found.values())


def _matches(folder: str, parts: list[str]) -> Iterator[str]:
    """The paths below a folder ("" is the current one) that the parts of a glob match.

    Raises:
        PermissionError: with the name of a folder that cannot be read.
    """
    if not parts:
        yield folder
        return
    part, *rest = parts
    if part == "**":
        for below in _tree(folder):
            yield from _matches(below, rest or ["*"])
    elif glob.has_magic(part):
        entries = {entry.name: entry for entry in _entries(folder)}
        for name in fnmatch.filter(entries, part):
            hidden = name.startswith(".") and not part.startswith(".")
            if not hidden and (not rest or _is_folder(entries[name])):
                yield from _matches(os.path.join(folder, name), rest)
    elif _holds(folder, part):
        yield from _matches(os.path.join(folder, part), rest)


def _tree(folder: str) -> Iterator[str]:
    """The folder and all below it but hidden ones, each once: links may lead anywhere."""
    seen, folders, links = set(), [folder], []
    while folders or links:
        here = (folders or links).pop()
        if _real(here) in seen:
            continue
        seen.add(_real(here))
        yield here
        for entry in _entries(here):
            if not entry.name.startswith(".") and _is_folder(entry):
                (links if entry.is_symlink() else folders).append(os.path.join(here, entry.name))


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder or os.curdir) as entries:
            return list(entries)
    except PermissionError:
        raise _closed(folder) from None
    except (FileNotFoundError, NotADirectoryError):
        return []


def _holds(folder: str, name: str) -> bool:
    try:
        os.lstat(os.path.join(folder, name))
    except PermissionError:
        raise _closed(folder) from None
    except OSError:
        return False
    return True


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except PermissionError:
        raise _closed(entry.path) from None
    except OSError:  # a link to itself
        return False


def _closed(folder: str) -> PermissionError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder or os.curdir)


def _identity(path: str) -> object:
    """The same for all names of a file."""
    try:
        stat = os.lstat(path)
        if S_ISLNK(stat.st_mode):
            real = os.path.realpath(path)
            stat = os.stat(real)
        else:
            real = os.path.join(_real(os.path.dirname(path)), os.path.basename(path))
    except OSError:  # a link to nothing
        return os.path.realpath(path)
    # Not every file system tells files apart by their number: where a file has one name, that says more.
    return (stat.st_dev, stat.st_ino) if stat.st_nlink > 1 else real


@functools.cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)
