"""Folders that come to be whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from maxsep.config import ConfigError
from maxsep.output.lock import NAME, Lock


def check_new(flag: str, folder: Path) -> None:
    """Refuses a folder that has something in it.

    Raises:
        ConfigError: it has.
    """
    if folder.exists() and not (folder.is_dir() and not os.listdir(folder)):
        raise ConfigError(f"{flag}: got {folder}, which is there already; takes a new folder, or an empty one")


@contextlib.contextmanager
def staged(flag: str, folder: Path) -> Iterator[Path]:
    """A folder to be filled, which becomes `folder` at the end of the block, and vanishes where the block fails.

    It lies beside it, with `.partial` after its name: what a kill leaves of it is swept away by the next attempt.

    Args:
        flag: that named `folder`.
        folder: absolute; new, or empty.

    Raises:
        ConfigError: `folder` has something in it, another process fills it, or the disk is full or cannot be written.
    """
    check_new(flag, folder)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with Lock(partial, flag=flag):
            try:
                for entry in partial.iterdir():
                    if entry.name != NAME:
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                yield partial
                (partial / NAME).unlink()
                partial.rename(folder)
                _sync(folder.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as e:
        raise ConfigError(f"{flag}: cannot write {folder}: {e.strerror or e}") from e


def _sync(folder: Path) -> None:
    """Makes what was renamed in it last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
