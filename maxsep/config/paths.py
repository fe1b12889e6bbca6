"""Paths that a user names, and where the package's own files lie."""

import os
import re
import shlex
import stat
from pathlib import Path

from maxsep.config.schema import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]  # the checkout: configs/ and benchmarks/ lie beside the package


def named(field: str, value: str) -> Path:
    """The absolute path that `field` names, `~` expanded; it need not exist.

    Raises:
        ConfigError: there can be no such path, or this user may not look there.
    """
    check_local(field, value)
    try:
        path = Path(value).expanduser().absolute()
        if path.is_dir():
            os.scandir(path).close()
    except (OSError, RuntimeError, ValueError) as e:  # of these RuntimeError: ~ of an unknown user
        reason = getattr(e, "strerror", None) or e
        raise ConfigError(f"{field}: got {value!r} ({reason}); takes a path that this user may read") from None
    return path


def check_local(field: str, value: str) -> None:
    """Refuses a URL, which would be a folder named `s3:` here, in every place where a user names a path.

    Raises:
        ConfigError: it is one.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise ConfigError(f"{field}: got {value!r}, a URL; takes a path of a file system, as a bucket's may be mounted")


def check_utf8(field: str, path: Path) -> None:
    """Refuses a folder that libraries in C++ could not name.

    Raises:
        ConfigError: the path is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{field}: got {str(path)!r}, which is not UTF-8; takes a path that is") from None


def to_write(field: str, value: str) -> Path:
    """As `named`, of a file that is to be written later; a link is followed. output/durable.py writes it.

    Raises:
        ConfigError: its folder does not exist, it is a folder itself, or this user may not write it.
    """
    path = named(field, value)
    try:
        path = path if is_stream(path) else path.resolve()
        writable = os.access(path, os.W_OK) if path.exists() else not is_stream(path)
        in_folder = is_stream(path) or (path.parent.is_dir() and os.access(path.parent, os.W_OK))
        if path.is_dir() or not writable or not in_folder:
            raise ConfigError(f"{field}: got {value!r}; takes a file to write, in a folder that exists")
    except (OSError, RuntimeError) as e:  # of these RuntimeError: a link to itself
        raise ConfigError(f"{field}: got {value!r} ({getattr(e, 'strerror', None) or e}); takes a file to write") from e
    return path


def is_stream(path: Path) -> bool:
    """Whether a path is no file that could be replaced: a device, a pipe, what the shell has opened."""
    if str(path).startswith(("/dev/fd/", "/dev/std", "/proc/")):
        return True
    try:
        return not stat.S_ISREG(path.stat().st_mode) and not path.is_dir()
    except FileNotFoundError:
        return False


def user_cache() -> Path | None:
    """maxsep's folder in the user's cache folder; None for a user who has none: neither XDG_CACHE_HOME nor a home."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "maxsep"
    try:
        return Path.home() / ".cache" / "maxsep"
    except RuntimeError:
        return None


def command(program: str, *flags: str) -> str:
    """A command line for people, of a program of the checkout, to be given from here."""
    return shlex.join(["python", str(shown(REPOSITORY / program)), *flags])


def shown(path: Path) -> Path:
    """An absolute path as a user would write it here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def run_folder(path: str, exists: bool, written: bool = True) -> Path:
    """A run's folder, absolute, checked but not made.

    Args:
        path: as given on the command line.
        exists: it must be there already.
        written: it is to be written to.

    Raises:
        ConfigError: it is missing though it must exist, or could not be made or written to.
    """
    if not path:
        raise ConfigError("--workdir: got '', which is no folder; takes a folder")
    folder = named("--workdir", path).resolve()
    check_utf8("--workdir", folder)
    if exists and not folder.is_dir():
        raise ConfigError(f"--workdir: got {path}, which does not exist; takes the folder of a run")
    if not written:
        return folder
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"--workdir: got {path}, but {parent} is not a folder to write to; takes a folder")
    return folder
