"""Text from files: .parquet, .jsonl, .txt. A glob of them, or a dataset's folder, whose files belong to splits.

.jsonl and .txt may be compressed (.gz, .xz, .bz2, .zst). `.json` is taken as .jsonl, as on Hugging Face's hub.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from maxsep.config import ConfigError, paths
from maxsep.data import dataset_folder, files, json_lines, parquet, text_sections
from maxsep.data.matching import matching
from maxsep.data.splits import Document
from maxsep.output.durable import write_json

LARGE = 1 << 28  # bytes of a file that take a while to read
EXPANSION = {"gz": 3, "xz": 3, "bz2": 3, "zst": 3, "parquet": 2}  # text is about so much larger than such a file
TAKES = "a glob of .parquet, .jsonl or .txt files, the latter two also .gz, .xz, .bz2, .zst; or a dataset's folder"


@dataclass(frozen=True)
class Part:
    """A stretch of a file, from the first of its cuts to the last."""

    path: str
    cuts: tuple[tuple[int, int], ...]
    column: str


class FilesSource:
    """The files that a glob matches, or that lie in a dataset's folder, by split, in the order of their names."""

    def __init__(self, path: str, name: str | None, column: str, cache_folder: Path):
        self._column = column
        if os.path.isdir(os.path.expanduser(path)):
            folder = str(paths.named("data.path", path))
            self._files = dataset_folder.splits(folder, name)
        elif name is not None:
            takes = "None where data.path is no folder; it names a part of a dataset's folder"
            raise ConfigError(f"data.name: got {name!r}; takes {takes}")
        else:
            self._files = {"train": matching(path)}
        self._paths = sorted(path for paths in self._files.values() for path in paths)
        if not self._paths:
            raise ConfigError(f"data.path: got {path!r}, which matches no file; takes {TAKES}")
        for file in self._paths:
            if (os.path.exists(file) and not os.path.isfile(file)) or not files.ENDINGS.fullmatch(file):
                raise ConfigError(f"data.path: got {path!r}, which matches {file!r}; takes {TAKES}")
            if not os.access(file, os.R_OK):
                files.check(file)  # which knows why, and has the last word
        of_parquet = [file for file in self._paths if files.kind(file) == "parquet"]
        if of_parquet:  # a wrong column is answered at once; the others are read when they are prepared
            parquet.check(of_parquet[0], column)
        part = f", {name}" if name else ""
        self.description = f"{len(self._paths)} file{'s' * (len(self._paths) > 1)}, {path}{part}"
        name = hashlib.sha256(os.path.abspath(path).encode(errors="surrogateescape")).hexdigest()[:16]
        self._scans_file = cache_folder / "scans" / f"{name}.json"

    @property
    def bytes(self) -> int:
        """Size of the text, roughly."""
        return sum(self.sizes().values())

    def sizes(self) -> dict[str, int]:
        """Bytes of text of each split, roughly."""

        def size(path: str) -> int:
            return os.path.getsize(path) * EXPANSION.get(files.compression(path) or files.kind(path), 1)

        return {split: sum(map(size, paths)) for split, paths in self._files.items()}

    def prepare(self, log: Callable[[str], None]) -> None:
        """Nothing is to do before the text can be read; tells of files that hold the same."""
        first = {}
        for path, scan in zip(self._paths, self._scans(log), strict=True):
            other = first.setdefault((files.kind(path), scan.sha256), path)
            if other != path and scan.cuts[-1][0]:
                log(f"WARNING: data.path: {path!r} has the same text as {other!r}: it is read twice")
                return

    def fingerprint(self, log: Callable[[str], None]) -> str:
        """Hash of the files' contents, kinds and splits, and of what is read of them.

        Reads them, once: what it finds is cached by path, size and time.
        """
        scans = dict(zip(self._paths, self._scans(log), strict=True))
        of = {s: [(files.kind(p), scans[p].sha256) for p in paths] for s, paths in sorted(self._files.items())}
        return hashlib.sha256(repr((of, self._column)).encode()).hexdigest()

    def quick_fingerprint(self) -> bool:
        """Whether `fingerprint` is known without reading the text."""
        known = self._known_scans()
        return all(files.state(path) in known for path in self._paths)

    def parts(self, split: str) -> Iterator[list[Part]]:
        """The split in groups of short parts, so that many small files are few jobs."""
        scans = dict(zip(self._paths, self._scans(lambda line: None), strict=True))
        group, size = [], 0
        for path in self._files[split]:
            cuts = scans[path].cuts
            # What is compressed can only be read from its start.
            ranges = [cuts] if files.compression(path) else itertools.pairwise(cuts)
            for of_part in ranges:
                group.append(Part(path, tuple(of_part), self._column))
                size += of_part[-1][0] - of_part[0][0]
                if size >= files.PIECE:
                    yield group
                    group, size = [], 0
        if group:
            yield group

    def _known_scans(self) -> dict[str, dict]:
        try:
            return json.loads(self._scans_file.read_bytes())
        except (OSError, ValueError):
            return {}

    def _scans(self, log: Callable[[str], None]) -> list[files.Scan]:
        """Of every file, from the cache where neither its size nor its time of change is another one."""
        known, states = self._known_scans(), [files.state(path) for path in self._paths]
        found = {}
        for path, state in zip(self._paths, states, strict=True):
            if state not in known:
                large = os.path.getsize(path) > LARGE
                if large:
                    log(f"reading {path} once, for its hash")
                found[state] = dataclasses.asdict(_scan(path))
                if large:
                    self._remember(known | found)
        if found:
            self._remember(known | found)
        known |= found
        return [files.Scan(known[state]["sha256"], tuple(map(tuple, known[state]["cuts"]))) for state in states]

    def _remember(self, scans: dict[str, dict]) -> None:
        # Where the cache is only read, or full, files are read again: the records may be there all the same.
        with contextlib.suppress(OSError):
            self._scans_file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._scans_file, scans, indent=None)

    @staticmethod
    def read(group: list[Part]) -> Iterator[Document]:
        """The parts' documents.

        Raises:
            ConfigError: a file that is damaged, is not UTF-8, or lacks a text; it names the file, and where it is known
                the line or row.
        """
        for part in group:
            start, stop = part.cuts[0][1], part.cuts[-1][1]
            match files.kind(part.path):
                case "jsonl":
                    yield from json_lines.read(part.path, part.cuts, part.column)
                case "txt":
                    yield from text_sections.read(part.path, start, stop)
                case "parquet":
                    yield from parquet.read(part.path, start, stop, part.column)


def _scan(path: str) -> files.Scan:
    """Reads the whole file."""
    scan = files.scan(path)
    match files.kind(path):
        case "txt":
            return dataclasses.replace(scan, cuts=text_sections.cuts(scan.cuts[-1][0]))
        case "parquet":
            return dataclasses.replace(scan, cuts=parquet.cuts(path))
    return scan
