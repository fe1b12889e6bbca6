"""Paths that a user names, and where the package's own files lie."""

import os
import shlex
from pathlib import Path

from maxsep.config.schema import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]  # the checkout: configs/ and benchmarks/ lie beside the package


def named(field: str, value: str) -> Path:
    """The absolute path that `field` names, `~` expanded; it need not exist.

    Raises:
        ConfigError: there can be no such path, or this user may not look there.
    """
    try:
        path = Path(value).expanduser().absolute()
        if path.is_dir():
            os.scandir(path).close()
    except (OSError, RuntimeError, ValueError) as e:  # of these RuntimeError: ~ of an unknown user
        reason = getattr(e, "strerror", None) or e
        raise ConfigError(f"{field}: got {value!r} ({reason}); takes a path that this user may read") from None
    return path


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
    """As `named`, of a file that is to be written later.

    Raises:
        ConfigError: its folder does not exist, or it is a folder itself.
    """
    path = named(field, value)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{field}: got {value!r}; takes a file to write, in a folder that exists")
    return path


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
