"""Files of text, or of token ids: those that a glob matches, or of a dataset's folder, whose files belong to splits."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from maxsep.config import ConfigError, paths
from maxsep.data import dataset_folder, files
from maxsep.data.files import Part
from maxsep.data.matching import matching
from maxsep.data.scans import Scans
from maxsep.data.splits import Document
from maxsep.data.text_files import TextFiles
from maxsep.data.token_files import TokenFiles


class FilesSource:
    """The files of each split, in the order of their names.

    Args:
        path: `data.path`.
        name: `data.name`.
        formats: what the files may be, and how they are read.
    """

    def __init__(self, path: str, name: str | None, formats: TextFiles | TokenFiles, cache_folder: Path):
        self._formats = formats
        if os.path.isdir(os.path.expanduser(path)):
            self._files = dataset_folder.splits(str(paths.named("data.path", path)), name, formats.endings)
        elif name is not None:
            takes = "None where data.path is no folder; it names a part of a dataset's folder"
            raise ConfigError(f"data.name: got {name!r}; takes {takes}")
        else:
            self._files = {"train": formats.of(matching(path))}
        self._paths = sorted(path for paths in self._files.values() for path in paths)
        if not self._paths:
            raise ConfigError(f"data.path: got {path!r}, which matches no file; takes {formats.takes}")
        for file in self._paths:
            if (os.path.exists(file) and not os.path.isfile(file)) or not formats.kind(file):
                raise ConfigError(f"data.path: got {path!r}, which matches {file!r}; takes {formats.takes}")
            if not os.access(file, os.R_OK):
                files.check(file)  # which knows why, and has the last word
        formats.check(self._paths)
        part = f", {name}" if name else ""
        self.description = f"{len(self._paths)} file{'s' * (len(self._paths) > 1)}, {path}{part}"
        self._scans = Scans(cache_folder, path, formats.state, formats.scan)

    @property
    def bytes(self) -> int:
        """Size of the text, roughly."""
        return sum(self.sizes().values())

    def sizes(self) -> dict[str, int]:
        """Bytes of text of each split, roughly."""
        return {split: sum(map(self._formats.size, paths)) for split, paths in self._files.items()}

    def prepare(self, log: Callable[[str], None]) -> None:
        """Nothing is to do before the text can be read; tells of files that hold the same."""
        first = {}
        for path, scan in self._scans.of(self._paths, log).items():
            other = first.setdefault((self._formats.kind(path), scan.sha256), path)
            if other != path and scan.cuts[-1][0]:
                log(f"WARNING: data.path: {path!r} has the same text as {other!r}: it is read twice")
                return

    def fingerprint(self, log: Callable[[str], None]) -> str:
        """Hash of the files' contents, kinds and splits, and of what is read of them.

        Reads them, once: what it finds is cached by path, size and time.
        """
        scans = self._scans.of(self._paths, log)
        of = {s: [(self._formats.kind(p), scans[p].sha256) for p in paths] for s, paths in sorted(self._files.items())}
        return hashlib.sha256(repr((of, self._formats)).encode()).hexdigest()

    def quick_fingerprint(self) -> bool:
        """Whether `fingerprint` is known without reading the text."""
        return self._scans.known(self._paths)

    def parts(self, split: str) -> Iterator[list[Part]]:
        """The split in groups of short parts, so that many small files are few jobs."""
        scans = self._scans.of(self._files[split])
        group, size = [], 0
        for path in self._files[split]:
            for part in self._formats.parts(path, scans[path].cuts):
                group.append(part)
                size += part.cuts[-1][0] - part.cuts[0][0]
                if size >= files.PIECE:
                    yield group
                    group, size = [], 0
        if group:
            yield group

    def read(self, group: list[Part]) -> Iterator[Document]:
        """The parts' documents.

        Raises:
            ConfigError: a file that is damaged or is none of its kind; it names the file, and where it can the place.
        """
        for part in group:
            yield from self._formats.read(part)
