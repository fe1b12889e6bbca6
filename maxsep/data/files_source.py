"""Text from plain files: .jsonl (a document a line, under the key "text") and .txt (a document a file).

Either may be compressed (.gz, .xz, .bz2, .zst). A .txt file is one document, with its empty lines.

How `train[a%:b%]` slices them: the documents of .jsonl files are dealt out evenly by their line, at random to the eye
(a golden-ratio sequence), so that sorted files do no harm and a document stays on its side when a file grows; .txt
files are laid end to end in the order of their names and cut at the next line, as one long text would be.
"""

import codecs
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from maxsep.config import ConfigError
from maxsep.data import files, intervals
from maxsep.data.matching import matching
from maxsep.output.durable import write_json

LARGE = 1 << 28  # bytes of a file that take a while to read
EXPANSION = 3  # text is about so much larger than its compressed file
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Part:
    """A stretch of a file: the pieces between its cuts."""

    path: str
    number: int  # of the file
    cuts: tuple[tuple[int, int], ...]
    slices: tuple[tuple[float, float], ...]  # of .jsonl: which documents, by their place in [0, 1)
    ends: bool  # of .txt: whether a document ends here


class FilesSource:
    """The files that a glob matches, in the order of their names."""

    def __init__(self, pattern: str, cache_folder: Path):
        self.paths = matching(pattern)
        if not self.paths:
            raise ConfigError(
                f"data.path: got {pattern!r}, which matches no file; takes a glob of .jsonl or .txt files"
            )
        for path in self.paths:
            if (os.path.exists(path) and not os.path.isfile(path)) or not files.ENDINGS.fullmatch(path):
                takes = "a glob of .jsonl or .txt files, also .gz, .xz, .bz2, .zst"
                raise ConfigError(f"data.path: got {pattern!r}, which matches {path!r}; takes {takes}")
            if not os.access(path, os.R_OK):
                files.check(path)  # which knows why, and has the last word
        self.description = f"{len(self.paths)} file{'s' * (len(self.paths) > 1)}, {pattern}"
        name = hashlib.sha256(os.path.abspath(pattern).encode(errors="surrogateescape")).hexdigest()[:16]
        self._scans_file = cache_folder / "scans" / f"{name}.json"

    @property
    def bytes(self) -> int:
        """Size of the text, roughly."""
        sizes = ((os.path.getsize(path), files.compression(path)) for path in self.paths)
        return sum(size * EXPANSION if compression else size for size, compression in sizes)

    def prepare(self, log: Callable[[str], None]) -> None:
        """Nothing is to do before the text can be read; tells of files that hold the same."""
        first = {}
        for path, scan in zip(self.paths, self._scans(log), strict=True):
            other = first.setdefault((files.kind(path), scan.sha256), path)
            if other != path and scan.cuts[-1][0]:
                held_out = "what is held out of one may be trained on in the other"
                log(f"WARNING: data.path: {path!r} has the same text as {other!r}: {held_out}")
                return

    def fingerprint(self, log: Callable[[str], None]) -> str:
        """Hash of the files' contents and kinds. Reads them, once: what it finds is cached by path, size and time."""
        kinds = [(files.kind(path), scan.sha256) for path, scan in zip(self.paths, self._scans(log), strict=True)]
        return hashlib.sha256(repr(kinds).encode()).hexdigest()

    def quick_fingerprint(self) -> bool:
        """Whether `fingerprint` is known without reading the text."""
        known = self._known_scans()
        return all(files.state(path) in known for path in self.paths)

    def check_splits(self, train: str | None, held_out: str | None) -> None:
        """Raises what `splits` does, without reading the files."""
        self._slices(train, held_out)

    def _slices(self, train: str | None, held_out: str | None) -> tuple[tuple[intervals.Interval, ...], ...]:
        """What is trained on and what is held out, in [0, 1)."""
        of_held_out = _slices("data.eval_split", held_out or "train[90%:]")
        of_train = _slices("data.split", train) if train else tuple(intervals.less((0, 1), of_held_out))
        if not of_train:
            raise intervals.nothing_left(held_out)
        if intervals.overlap(of_train, of_held_out):
            raise ConfigError(f"data.split: got {train}, which overlaps the held-out split {held_out or 'train[90%:]'}")
        return of_train, of_held_out

    def splits(self, train: str | None, held_out: str | None) -> tuple[list[list[Part]], list[list[Part]]]:
        """The parts, in groups, of the training and of the held-out text.

        Raises:
            ConfigError: a split that is not of the form `train[a%:b%]`, or text in both.
        """
        sides = self._slices(train, held_out)
        scans = self._scans(lambda line: None)
        return tuple(_grouped(self._parts(scans, slices)) for slices in sides)

    def _parts(self, scans: list[files.Scan], slices: tuple[tuple[float, float], ...]) -> Iterator[Part]:
        sizes = [
            scan.cuts[-1][0] if files.kind(path) == "txt" else 0 for path, scan in zip(self.paths, scans, strict=True)
        ]
        before, whole = 0, sum(sizes)
        for number, (path, scan, size) in enumerate(zip(self.paths, scans, sizes, strict=True)):
            if files.kind(path) == "jsonl":
                yield from _pieces(Part(path, number, scan.cuts, slices, True))
                continue
            for a, b in slices:
                first, last = (files.cut_at(path, round(share * whole) - before, size) for share in (a, b))
                if first < last:
                    inside = [cut for cut in scan.cuts if first < cut[0] < last]
                    yield from _pieces(Part(path, number, ((first, 0), *inside, (last, 0)), (), True))
            before += size

    def _known_scans(self) -> dict[str, dict]:
        try:
            return json.loads(self._scans_file.read_bytes())
        except (OSError, ValueError):
            return {}

    def _scans(self, log: Callable[[str], None]) -> list[files.Scan]:
        """Of every file, from the cache where neither its size nor its time of change is another one."""
        known, states = self._known_scans(), [files.state(path) for path in self.paths]
        found = {}
        for path, state in zip(self.paths, states, strict=True):
            if state not in known:
                large = os.path.getsize(path) > LARGE
                if large:
                    log(f"reading {path} once, for its hash")
                found[state] = dataclasses.asdict(files.scan(path))
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
    def read(group: list[Part]) -> Iterator[tuple[str, bool, str]]:
        """The parts' texts, each with whether a document ends with it, and where it lies.

        Raises:
            ConfigError: text that is not UTF-8, a line that is not JSON with a text; it names file and line.
        """
        for part in group:
            pieces = files.read_pieces(part.path, part.cuts)
            yield from _lines(part, pieces) if files.kind(part.path) == "jsonl" else _stretches(part, pieces)


def _slices(field: str, split: str) -> tuple[intervals.Interval, ...]:
    slices = []
    for term in split.split("+"):
        match = re.fullmatch(r"train(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", term.strip())
        a, b = (int(match[1] or 0), int(match[2] or 100)) if match else (0, 0)
        if not 0 <= a < b <= 100:
            raise ConfigError(f"{field}: got {split}; takes train or slices of it, as train[:90%], of files")
        slices.append((a / 100, b / 100))
    return intervals.once(slices)


def place(number: int, line: int) -> float:
    """Where in [0, 1) a document falls, line `line` of file `number`: what `train[a%:b%]` slices.

    Consecutive lines fall evenly over the whole range; the first of all among the last 5 %, so that already two
    documents make a training and a held-out split.
    """
    return (0.95 + (number + line) * _GOLDEN) % 1


def _pieces(part: Part) -> Iterator[Part]:
    """Short parts, where a file can be read from anywhere."""
    if files.compression(part.path) or len(part.cuts) == 2:
        yield part
        return
    for i, cuts in enumerate(zip(part.cuts, part.cuts[1:], strict=False)):
        yield Part(part.path, part.number, cuts, part.slices, i == len(part.cuts) - 2)


def _grouped(parts: Iterator[Part]) -> list[list[Part]]:
    """Neighbours together up to the size of a piece, so that many small files are few jobs."""
    groups, size = [], files.PIECE
    for part in parts:
        if size >= files.PIECE:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.cuts[-1][0] - part.cuts[0][0]
    return groups


def _lines(part: Part, pieces: Iterator[bytes]) -> Iterator[tuple[str, bool, str]]:
    for piece, (_, lines) in zip(pieces, part.cuts, strict=False):
        for number, line in enumerate(io.BytesIO(piece), lines):
            where = place(part.number, number)
            if not any(a <= where < b for a, b in part.slices):
                continue
            content = line.removeprefix(codecs.BOM_UTF8).strip()
            if not content:
                continue
            at = f"{part.path}:{number + 1}"
            try:
                document = json.loads(
                    content.decode()
                )  # from bytes it takes halves of surrogate pairs, UTF-16 and more
            except UnicodeDecodeError:
                raise ConfigError(f"data.path: {at} is not UTF-8") from None
            except (ValueError, RecursionError) as error:
                what = "UTF-8" if b"\0" in content else f"JSON: {error}"  # English as UTF-16 is every other byte 0
                raise ConfigError(f"data.path: {at} is not {what}") from None
            text = document.get("text") if isinstance(document, dict) else None
            if not isinstance(text, str):
                raise ConfigError(f'data.path: {at} has no string under the key "text"')
            # JSON can spell half a surrogate pair, which is no character.
            yield text if text.isascii() else text.encode("utf-8", "replace").decode(), True, at


def _stretches(part: Part, pieces: Iterator[bytes]) -> Iterator[tuple[str, bool, str]]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    last = len(part.cuts) - 2
    for i, piece in enumerate(pieces):
        start = part.cuts[i][0]
        if start == 0:
            piece = piece.removeprefix(codecs.BOM_UTF8)
        try:
            yield decoder.decode(piece, final=i == last), i == last and part.ends, f"{part.path}, from byte {start} on"
        except UnicodeDecodeError as error:
            raise ConfigError(f"data.path: {part.path} is not UTF-8, near byte {start + error.start}") from None
