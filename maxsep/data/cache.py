"""The folder of prepared data, and how several processes share it."""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

from maxsep.config import ConfigError, paths


def root(cache: str | None) -> Path:
    """The folder that `data.cache` names, or else maxsep in the user's cache folder; made if missing.

    It may be one that is only read: what is prepared there is used. Who writes does so inside `writing`.
    """
    folder = paths.named("data.cache", cache) if cache else paths.user_cache()
    if folder is None:
        raise ConfigError("data.cache: got None; takes a folder to write to, as this user has no home")
    paths.check_utf8("data.cache", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.cache: got {str(folder)!r} ({error.strerror}); takes a folder to write to") from None
    return folder.absolute()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the system says of a full disk, or a folder that may only be read, becomes the user's one line."""
    try:
        yield
    except BrokenPipeError:  # of the console
        raise
    except OSError as error:
        raise ConfigError(f"data.cache: cannot write below {folder} ({error.strerror or error})") from None


@contextlib.contextmanager
def locked(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Only one process at a time is inside, of all that name the same folder. The system frees a dead one's lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that prepares {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
