"""What one reading of each file found, kept in the cache by the file's path, size and time of change."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from maxsep.data.files import Scan
from maxsep.output.durable import write_json

LARGE = 1 << 28  # bytes of a file that take a while to read


class Scans:
    """The scans of a source's files.

    Args:
        path: as the source is named; each has a file in the cache.
        state: what changes when a file does.
        scan: reads a file.
    """

    def __init__(self, cache_folder: Path, path: str, state: Callable[[str], str], scan: Callable[[str], Scan]):
        name = hashlib.sha256(os.path.abspath(path).encode(errors="surrogateescape")).hexdigest()[:16]
        self._file, self._state, self._scan = cache_folder / "scans" / f"{name}.json", state, scan

    def known(self, paths: Iterable[str]) -> bool:
        """Whether no file must be read."""
        known = self._known()
        return all(self._state(path) in known for path in paths)

    def of(self, paths: list[str], log: Callable[[str], None] = lambda line: None) -> dict[str, Scan]:
        """The scan of each file; it is read where its state is another one.

        Raises:
            ConfigError: a file that cannot be read.
        """
        known, states = self._known(), {path: self._state(path) for path in paths}
        found = {}
        for path, state in states.items():
            if state not in known:
                large = os.path.getsize(path) > LARGE
                if large:
                    log(f"reading {path} once, for its hash")
                found[state] = dataclasses.asdict(self._scan(path))
                if large:
                    self._remember(known | found)
        if found:
            self._remember(known | found)
        known |= found
        return {
            path: Scan(known[state]["sha256"], tuple(map(tuple, known[state]["cuts"])))
            for path, state in states.items()
        }

    def _known(self) -> dict[str, dict]:
        try:
            return json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}

    def _remember(self, scans: dict[str, dict]) -> None:
        # Where the cache is only read, or full, files are read again: the records may be there all the same.
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, scans, indent=None)
