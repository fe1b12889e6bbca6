"""Text from plain files: .jsonl (a document a line, under the key "text") and .txt (a document a file).

Either may be compressed (.gz, .xz, .bz2, .zst). A .txt file is one document, with its empty lines.

How `train[a%:b%]` slices them: the documents of .jsonl files are dealt out evenly by their line, at random to the eye
(a golden-ratio sequence), so that sorted files do no harm and a document stays on its side when a file grows; .txt
files are laid end to end in the order of their names and cut at the next line, as one long text would be.
"""

import bz2
import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from maxsep.config import ConfigError
from maxsep.data import cache
from maxsep.data.tfds_source import complement

ENDINGS = re.compile(r".*\.(jsonl|txt)(?:\.(gz|xz|bz2|zst))?", re.IGNORECASE | re.DOTALL)
BLOCK = 1 << 20  # bytes read at once
PIECE = 16 << 20  # bytes, roughly, between the places where a file may be cut
EXPANSION = 3  # text is about so much larger than its compressed file
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Scan:
    """What one pass over a file finds: its hash, and where it may be cut into pieces (byte, and lines before it)."""

    sha256: str
    cuts: tuple[tuple[int, int], ...]  # from (0, 0) to (size, lines)


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
        self.paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not self.paths:
            raise ConfigError(
                f"data.path: got {pattern!r}, which matches no file; takes a glob of .jsonl or .txt files"
            )
        for path in self.paths:
            if not os.path.isfile(path) or not ENDINGS.fullmatch(path):
                takes = "a glob of .jsonl or .txt files, also .gz, .xz, .bz2, .zst"
                raise ConfigError(f"data.path: got {pattern!r}, which matches {path!r}; takes {takes}")
            if not os.access(path, os.R_OK):
                raise ConfigError(f"data.path: {path!r} cannot be read; takes files that this user may read")
        self.description = f"{len(self.paths)} file{'s' * (len(self.paths) > 1)}, {pattern}"
        self._scans_folder = cache_folder / "scans"

    @property
    def bytes(self) -> int:
        """Size of the text, roughly."""
        sizes = ((os.path.getsize(path), _compression(path)) for path in self.paths)
        return sum(size * EXPANSION if compression else size for size, compression in sizes)

    def prepare(self, log: Callable[[str], None]) -> None:
        """What is still to do before the text can be read: nothing."""

    def fingerprint(self, log: Callable[[str], None]) -> str:
        """Hash of the files' contents and kinds. Reads them, once: what it finds is cached by path, size and time."""
        kinds = [(_kind(path), scan.sha256) for path, scan in zip(self.paths, self._scans(log), strict=True)]
        return hashlib.sha256(repr(kinds).encode()).hexdigest()

    def quick_fingerprint(self) -> bool:
        """Whether `fingerprint` is known without reading the text."""
        return all(self._scan_file(path).exists() for path in self.paths)

    def splits(self, train: str | None, held_out: str | None) -> tuple[list[Part], list[Part]]:
        """The parts of the training and of the held-out text.

        Raises:
            ConfigError: a split that is not of the form `train[a%:b%]`, or text in both.
        """
        held_out = held_out or "train[90%:]"
        train = train or complement(held_out)
        sides = _slices("data.split", train), _slices("data.eval_split", held_out)
        if any(a < d and c < b for a, b in sides[0] for c, d in sides[1]):
            raise ConfigError(f"data.split: got {train}, which overlaps the held-out split {held_out}")
        return tuple(list(self._parts(slices)) for slices in sides)

    def _parts(self, slices: tuple[tuple[float, float], ...]) -> Iterator[Part]:
        scans = self._scans(lambda line: None)
        sizes = [scan.cuts[-1][0] if _kind(path) == "txt" else 0 for path, scan in zip(self.paths, scans, strict=True)]
        before = 0
        for number, (path, scan, size) in enumerate(zip(self.paths, scans, sizes, strict=True)):
            if _kind(path) == "jsonl":
                yield from _pieces(Part(path, number, scan.cuts, slices, True))
                continue
            for a, b in slices:
                first, last = (_cut_at(path, round(share * sum(sizes)) - before, size) for share in (a, b))
                if first < last:
                    inside = [cut for cut in scan.cuts if first < cut[0] < last]
                    yield from _pieces(Part(path, number, ((first, 0), *inside, (last, 0)), (), True))
            before += size

    def _scan_file(self, path: str) -> Path:
        stat = os.stat(path)
        key = f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"
        return self._scans_folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _scans(self, log: Callable[[str], None]) -> list[Scan]:
        return [self._scan(path, log) for path in self.paths]

    def _scan(self, path: str, log: Callable[[str], None]) -> Scan:
        known = self._scan_file(path)
        try:
            found = json.loads(known.read_bytes())
            return Scan(found["sha256"], tuple(map(tuple, found["cuts"])))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if os.path.getsize(path) > 1 << 28:
            log(f"reading {path} once, for its hash")
        found = scan(path)
        known.parent.mkdir(parents=True, exist_ok=True)
        cache.write_json(known, {"sha256": found.sha256, "cuts": found.cuts})
        return found

    def read(self, part: Part) -> Iterator[tuple[str, bool]]:
        """The part's texts, each with whether a document ends with it.

        Raises:
            ConfigError: text that is not UTF-8, a line that is not JSON with a text; it names file and line.
        """
        pieces = _read_pieces(part)
        return _lines(part, pieces) if _kind(part.path) == "jsonl" else _stretches(part, pieces)


def scan(path: str) -> Scan:
    """Reads the whole file.

    Raises:
        ConfigError: a file that cannot be read to its end.
    """
    digest, cuts = hashlib.sha256(), [(0, 0)]
    size = lines = 0
    with _reading(path), _open(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if size + len(block) - cuts[-1][0] > PIECE:
                newline = block.rfind(b"\n")
                if newline >= 0:
                    cuts.append((size + newline + 1, lines + block.count(b"\n")))
            size += len(block)
            lines += block.count(b"\n")
    if cuts[-1][0] < size:
        cuts.append((size, lines))
    return Scan(digest.hexdigest(), tuple(cuts))


def _slices(field: str, split: str) -> tuple[tuple[float, float], ...]:
    slices = []
    for term in split.split("+"):
        match = re.fullmatch(r"train(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", term.strip())
        a, b = (int(match[1] or 0), int(match[2] or 100)) if match else (0, 0)
        if not 0 <= a < b <= 100:
            raise ConfigError(
                f"{field}: got {split}; takes train or slices of it, as train[:90%], where files are read"
            )
        slices.append((a / 100, b / 100))
    return tuple(slices)


def place(number: int, line: int) -> float:
    """Where in [0, 1) a document falls, line `line` of file `number`: what `train[a%:b%]` slices.

    Consecutive lines fall evenly over the whole range; the first of all among the last 5 %, so that already two
    documents make a training and a held-out split.
    """
    return (0.95 + (number + line) * _GOLDEN) % 1


def _cut_at(path: str, offset: int, size: int) -> int:
    """The first line that starts at or after the offset, or the next character where no line starts soon."""
    if offset <= 0 or offset >= size:
        return min(max(offset, 0), size)
    with _reading(path), _open(path) as file:
        _skip(file, offset - 1)
        block = file.read(65536)
    newline = block.find(b"\n")
    if newline >= 0:
        return offset + newline
    following = 1
    while following < len(block) and block[following] & 0xC0 == 0x80:
        following += 1
    return offset + following - 1


def _pieces(part: Part) -> Iterator[Part]:
    """Short parts, where a file can be read from anywhere."""
    if _compression(part.path) or len(part.cuts) == 2:
        yield part
        return
    for i, cuts in enumerate(zip(part.cuts, part.cuts[1:], strict=False)):
        yield Part(part.path, part.number, cuts, part.slices, i == len(part.cuts) - 2)


def _read_pieces(part: Part) -> Iterator[tuple[bytes, int]]:
    """The bytes between the part's cuts, each with the number of lines before it."""
    with _reading(part.path), _open(part.path) as file:
        if _compression(part.path):
            _skip(file, part.cuts[0][0])
        else:
            file.seek(part.cuts[0][0])
        for (start, lines), (stop, _) in zip(part.cuts, part.cuts[1:], strict=False):
            piece = file.read(stop - start)
            if len(piece) != stop - start:
                raise ConfigError(f"data.path: {part.path!r} changed while it was read")
            yield piece, lines


def _lines(part: Part, pieces: Iterator[tuple[bytes, int]]) -> Iterator[tuple[str, bool]]:
    for piece, lines in pieces:
        for number, line in enumerate(io.BytesIO(piece), lines):
            where = place(part.number, number)
            if not line.strip() or not any(a <= where < b for a, b in part.slices):
                continue
            at = f"data.path: {part.path}:{number + 1}"
            try:
                document = json.loads(line.removeprefix(codecs.BOM_UTF8))
            except UnicodeDecodeError:
                raise ConfigError(f"{at} is not UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{at} is not JSON: {error}") from None
            text = document.get("text") if isinstance(document, dict) else None
            if not isinstance(text, str):
                raise ConfigError(f'{at} has no string under the key "text"')
            # JSON can spell half a surrogate pair, which is no character.
            yield text if text.isascii() else text.encode("utf-8", "replace").decode(), True


def _stretches(part: Part, pieces: Iterator[tuple[bytes, int]]) -> Iterator[tuple[str, bool]]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    last = len(part.cuts) - 2
    for i, (piece, _) in enumerate(pieces):
        if part.cuts[i][0] == 0:
            piece = piece.removeprefix(codecs.BOM_UTF8)
        try:
            yield decoder.decode(piece, final=i == last), i == last and part.ends
        except UnicodeDecodeError as error:
            byte = part.cuts[i][0] + error.start
            raise ConfigError(f"data.path: {part.path} is not UTF-8, near byte {byte}") from None


def _kind(path: str) -> str:
    return ENDINGS.fullmatch(path)[1].lower()


def _compression(path: str) -> str | None:
    return ENDINGS.fullmatch(path)[2]


def _open(path: str):
    compression = (_compression(path) or "").lower()
    if compression == "zst":
        import pyarrow

        return pyarrow.input_stream(path, compression="zstd")
    if not compression:
        return open(path, "rb")
    return {"gz": gzip, "xz": lzma, "bz2": bz2}[compression].open(path, "rb")


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turns what a damaged file raises into the user's one line."""
    try:
        yield
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"data.path: {path!r} cannot be read to its end: {error}") from None


def _skip(file, size: int) -> None:
    while size and (block := file.read(min(size, BLOCK))):
        size -= len(block)
