"""Files of token ids, as other trainers write them. Their documents are those between two ends of a text.

- `NAME.bin` with `NAME.idx` beside it: Megatron-LM's; the index says where sequences and documents begin.
- `.bin` alone: nanoGPT's, ids and nothing else, uint16 where the tokenizer's ids fit and uint32 where they do not; or
  llm.c's, with a header of 256 int32.
- `.npy`: an array of integers in one dimension.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maxsep.config import ConfigError
from maxsep.data import files, splits
from maxsep.data.files import Cuts, Part, Scan
from maxsep.data.records import id_dtype
from maxsep.data.splits import BYTES_A_TOKEN, Document

BLOCK = 1 << 20  # ids looked through at once
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # of Megatron-LM, those that hold ids
_HEADERS = {20240520: "<u2", 20240801: "<u4"}  # of llm.c: GPT-2's ids, and Llama 3's
_HEADER = 256 * 4  # bytes


@dataclass(frozen=True)
class TokenFiles:
    """How files of ids are read: those of a tokenizer with `vocab_size` ids, of which `end` ends a text."""

    tokenizer: str
    vocab_size: int
    end: int

    takes = "a glob of .bin (with .idx beside it, or without) or .npy files, or a folder of them"
    endings = (r"\.bin", r"\.npy")

    def of(self, paths: list[str]) -> list[str]:
        """The paths without indexes, which belong to the files beside them."""
        return [path for path in paths if not (path.endswith(".idx") and Path(path).with_suffix(".bin").exists())]

    def kind(self, path: str) -> str | None:
        """bin, npy, or None for none of them."""
        return path[-3:] if path.endswith((".bin", ".npy")) else None

    def state(self, path: str) -> str:
        """What changes when the file does, or its index."""
        return " ".join(files.state(str(file)) for file in (path, _index_of(path)) if file)

    def size(self, path: str) -> int:
        """Bytes of the ids' text, roughly."""
        return len(self._ids(path)) * BYTES_A_TOKEN

    def check(self, paths: Iterable[str]) -> None:
        """Has a foreign file answered at once."""
        for path in paths:
            self._ids(path)

    def scan(self, path: str) -> Scan:
        """Reads the whole file for its hash, with the index beside it, which is checked."""
        index = _index_of(path)
        hashes = [files.scan(str(file)).sha256 for file in (path, index) if file]
        size = count = len(self._ids(path))
        if index:
            count = len(_Index(index, path).checked().starts)
        step = max(1, files.PIECE * max(1, count) // max(1, size))
        cuts = [(size * start // max(1, count), start) for start in range(0, count, step)]
        return Scan("-".join(hashes), (*cuts, (size, count)))

    def parts(self, path: str, cuts: Cuts) -> Iterator[Part]:
        for of_part in itertools.pairwise(cuts):
            yield Part(path, of_part)

    def read(self, part: Part) -> Iterator[Document]:
        """The documents that begin in the part, each without the end of its text."""
        ids, start, stop = self._ids(part.path), part.cuts[0][1], part.cuts[-1][1]
        index = _index_of(part.path)
        found = _Index(index, part.path).documents(ids, start, stop) if index else self._between_ends(ids, start, stop)
        for at, document in found:
            at = f"{part.path}, ids from {at:,} on"
            while len(document) and document[-1] == self.end:
                document = document[:-1]
            if len(document) and not 0 <= document.min() <= document.max() < self.vocab_size:
                wrong = document[(document < 0) | (document >= self.vocab_size)][0]
                got = f"has the id {wrong}, read as {ids.dtype.itemsize} bytes"
                takes = f"ids below {self.vocab_size:,}, as data.tokenizer is {self.tokenizer}"
                raise ConfigError(f"data.path: {at}: {got}; takes {takes}")
            # The same place, whatever type a file has.
            yield Document(document, splits.place(document.astype("<u4").tobytes()), at)

    def _between_ends(self, ids: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Runs of ids without an end of a text that begin from `start` on, before `stop`, and where they do."""
        begin = start if start == 0 or ids[start - 1] == self.end else None  # of a run
        pieces = []
        for offset in range(start, len(ids), BLOCK):
            block = np.asarray(ids[offset : offset + BLOCK])
            last = 0
            for end in np.flatnonzero(block == self.end).tolist():
                if begin is not None:
                    yield begin, np.concatenate([*pieces, block[last:end]])
                begin, last, pieces = offset + end + 1, end + 1, []
                if begin >= stop:
                    return
            if begin is None:
                if offset + len(block) >= stop:  # no run begins here
                    return
            else:
                pieces.append(block[last:])
        if begin is not None:
            yield begin, np.concatenate([*pieces, ids[:0]])

    def _ids(self, path: str) -> np.ndarray:
        """All ids, mapped.

        Raises:
            ConfigError: the file is none of these kinds, or does not fit its index.
        """
        try:
            if index := _index_of(path):
                return _Index(index, path).ids
            if path.endswith(".npy"):
                return self._array(path)
            return self._plain(path)
        except ConfigError:
            raise
        except (OSError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"data.path: {path!r} cannot be read: {reason}") from None

    def _array(self, path: str) -> np.ndarray:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim != 1:
            what = f"{ids.dtype}{list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
            raise ConfigError(f"data.path: {path!r} is {what}; takes an array of integers in one dimension")
        return ids

    def _plain(self, path: str) -> np.ndarray:
        size = os.path.getsize(path)
        dtype, offset = id_dtype(self.vocab_size).newbyteorder("<"), 0
        with open(path, "rb") as file:
            head = np.frombuffer(file.read(_HEADER), "<i4", count=min(size, _HEADER) // 4)
        if len(head) == 256 and head[0] in _HEADERS:
            dtype, offset = np.dtype(_HEADERS[head[0]]), _HEADER
            if size != offset + head[2] * dtype.itemsize:
                what = f"{head[2]:,} ids by its header, and {(size - offset) / dtype.itemsize:,g} by its size"
                raise ConfigError(f"data.path: {path!r} has {what}; takes a file as it was written")
        if (size - offset) % dtype.itemsize:
            takes = f"whole ids of {dtype.itemsize} bytes, as data.tokenizer is {self.tokenizer}"
            raise ConfigError(f"data.path: {path!r} has {size:,} bytes; takes {takes}")
        ids = _mapped(path, dtype, offset)
        if dtype.itemsize == 2 and not offset and ids[:BLOCK:2].any() and not ids[1:BLOCK:2].any():
            why = "every second of its ids of 2 bytes is 0: it has ids of 4 bytes"
            takes = f"ids of 2, as data.tokenizer is {self.tokenizer}, or the ids as .npy"
            raise ConfigError(f"data.path: {path!r}: {why}; takes {takes}")
        return ids


class _Index:
    """Megatron-LM's `.idx` of a `.bin`: a head, then each sequence's length and place, and each document's first one.

    Its form: https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/datasets/indexed_dataset.py.
    """

    def __init__(self, index: Path, path: str):
        size = index.stat().st_size
        with open(index, "rb") as file:
            head = file.read(len(_INDEX_MAGIC) + 8 + 1 + 8 + 8)
        if head[: len(_INDEX_MAGIC)] != _INDEX_MAGIC or len(head) < 34:
            raise ConfigError(f"data.path: {str(index)!r} is not an index of Megatron-LM's; takes one beside {path!r}")
        version, sequences, documents = (int.from_bytes(head[i : i + 8], "little") for i in (9, 18, 26))
        if version != 1 or head[17] not in _INDEX_TYPES:
            what = f"version {version}, type {head[17]}"
            raise ConfigError(f"data.path: {str(index)!r} has {what}; takes version 1, and a type of integers")
        dtype = np.dtype(_INDEX_TYPES[head[17]])
        expected = len(head) + 4 * sequences + 8 * sequences + 8 * documents
        if size not in (expected, expected + sequences):  # with a byte a sequence where there are several kinds of data
            raise ConfigError(f"data.path: {str(index)!r} has {size:,} bytes, not {expected:,}: it is cut, or damaged")
        self._index, self._path, self._itemsize = index, path, dtype.itemsize
        self._lengths = _mapped(str(index), np.dtype("<i4"), len(head), sequences)
        self._places = _mapped(str(index), np.dtype("<i8"), len(head) + 4 * sequences, sequences)
        bounds = _mapped(str(index), np.dtype("<i8"), len(head) + 12 * sequences, documents)
        self.starts, self._ends = bounds[:-1], bounds[1:]
        last = int(self._places[-1]) + int(self._lengths[-1]) * dtype.itemsize if sequences else 0
        if last != os.path.getsize(path):
            self._refuse()
        self.ids = _mapped(path, dtype, 0)

    def checked(self) -> "_Index":
        """Reads all of it.

        Raises:
            ConfigError: a sequence does not lie in the file, or a document does not begin with one.
        """
        stops = self._places + self._lengths.astype(np.int64) * self._itemsize
        least, most = min(self._places.min(initial=0), self._lengths.min(initial=0)), stops.max(initial=0)
        inside = least >= 0 and most <= self.ids.nbytes
        bounds = [*self.starts[:1], *self._ends[-1:]]
        ascending = (self._ends >= self.starts).all() and bounds in ([], [0, len(self._lengths)])
        if not (inside and ascending):
            self._refuse()
        return self

    def _refuse(self) -> None:
        index = str(self._index)
        raise ConfigError(f"data.path: {index!r} does not fit {self._path!r}: it is another file's, or damaged")

    def documents(self, ids: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """The documents number `start` to `stop`, without the latter, and where each begins in the file."""
        for first, end in zip(self.starts[start:stop].tolist(), self._ends[start:stop].tolist(), strict=True):
            begins = (self._places[first:end] // self._itemsize).tolist()
            pieces = [
                ids[at : at + length] for at, length in zip(begins, self._lengths[first:end].tolist(), strict=True)
            ]
            if pieces:
                yield begins[0], np.concatenate(pieces)


def _index_of(path: str) -> Path | None:
    index = Path(path).with_suffix(".idx")
    return index if path.endswith(".bin") and index.exists() else None


def _mapped(path: str, dtype: np.dtype, offset: int, count: int | None = None) -> np.ndarray:
    """The file's entries from a byte on: `count`, or all."""
    count = (os.path.getsize(path) - offset) // dtype.itemsize if count is None else count
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)
