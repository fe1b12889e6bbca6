"""The folder of prepared data, and how several processes share it."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from maxsep.config import ConfigError, paths


def root(cache: str | None) -> Path:
    """The folder that `data.cache` names, or else maxsep in the user's cache folder; made if missing."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = paths.named("data.cache", cache) if cache else Path(user) / "maxsep"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.cache: got {str(folder)!r} ({error.strerror}); takes a folder to write to") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"data.cache: got {str(folder)!r} (not writable); takes a folder to write to")
    return folder.absolute()


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
