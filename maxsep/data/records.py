"""Prepared text: fixed records of token ids in array_record shards, with a manifest.

Documents, each followed by the end of a text, make one stream of tokens a split. Record i is `stream[i*S : i*S + S+1]`:
S inputs and their S targets. Neighbours share a token, so every token but the first is predicted exactly once; the last
record is shorter, and padded with -1 when read. A record is stored as the bytes of its ids, uint16 where they fit.

    manifest.json     format, sequence length, tokenizer, source, counts, and every shard's file, size and checksum
    train-00000.array_record, ..., eval-00000.array_record, ...
"""

import bisect
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from maxsep.config import ConfigError, cli, faults
from maxsep.config.checksum import checksum
from maxsep.output.console import say

FORMAT = 2
PAD = -1
SHARD_TOKENS = 1 << 27
OPEN_SHARDS = 512  # at once: below the usual limit of open files
_OPTIONS = "group_size:1,zstd:1"  # a record can be read alone; zstd's quickest level halves the size


class Damaged(ConfigError):
    """Prepared data that is not as it was written."""

    def __init__(self, path: Path, what: object):
        super().__init__(f"data.cache: {path} is damaged ({what})")


class Records:
    """The records of a split, read by index; safe to share between threads.

    `len(records)`; `records[i]`: int32 [sequence_length + 1], PAD (-1) after the last token; `targets`: how many tokens
    are predicted in all.
    """

    def __init__(self, folder: Path, split: dict, sequence_length: int, dtype: np.dtype):
        self.targets = split["tokens"] - 1
        self.documents = split["documents"]
        self.sequence_length = sequence_length
        self._dtype = dtype
        self._folder, self._shards = folder, split["shards"]
        self._ends = list(itertools.accumulate(shard["records"] for shard in split["shards"]))
        self._open = functools.lru_cache(OPEN_SHARDS)(open_shard)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        index = index.__index__()
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        record = np.full(self.sequence_length + 1, PAD, np.int32)
        tokens = self._read(shard, index - first)
        record[: len(tokens)] = tokens
        return record

    def _read(self, shard: int, index: int) -> np.ndarray:
        path = self._folder / self._shards[shard]["file"]

        def read() -> np.ndarray:
            try:
                return np.frombuffer(self._open(path).read([index])[0], self._dtype)
            except Exception:
                self._open.cache_clear()  # what was opened before a fault may fail after it too
                raise

        try:
            return faults.retried(read, told=_told)
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._unreadable(self._shards[shard], index, error) from error

    def _unreadable(self, shard: dict, index: int, error: Exception) -> Exception:
        """Where the file is whole, its content is damaged; else a new start finds it again, or prepares it anew."""
        path, reason = self._folder / shard["file"], " ".join(str(error).split())
        code = faults.number(error)
        if code in faults.RIGHTS:
            return _fault(path, error)
        with contextlib.suppress(OSError):
            if code is None and path.stat().st_size == shard["bytes"]:
                return Damaged(path, f"record {index}: {reason}; delete its folder to have it prepared again")
        return cli.Exit(cli.RESTART, f"data.cache: {path} cannot be read: {reason}; the same command resumes")


class Corpus:
    """What a run learns from: `train` and `eval` records, and what made them.

    `fingerprint`: a hash of all tokens of both splits, the tokenizer and the sequence length. `unigram_entropy`: nats a
    token, of the held-out targets under add-one counts of the training split's targets over the tokenizer's ids.
    `source`: where its text lies, which may be elsewhere than it lay when it was prepared.
    """

    def __init__(self, folder: Path, tokenizer, source: str):
        manifest = read_manifest(folder)
        dtype = id_dtype(tokenizer.vocab_size)
        self.folder = folder
        self.tokenizer = tokenizer
        self.train = Records(folder, manifest["train"], manifest["sequence_length"], dtype)
        self.eval = Records(folder, manifest["eval"], manifest["sequence_length"], dtype)
        self.fingerprint = manifest["fingerprint"]
        self.unigram_entropy = manifest["unigram_entropy"]
        self.source = source

    @property
    def description(self) -> str:
        """One line for the console."""
        train, held_out = self.train, self.eval
        return (
            f"{self.source}: {train.targets + 1:,} tokens of {train.documents:,} documents to train on, "
            f"{held_out.targets + 1:,} of {held_out.documents:,} held out"
        )


def id_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def read_manifest(folder: Path) -> dict:
    """The manifest of a prepared folder, once every shard is there with its size and number of records.

    Raises:
        Damaged: the folder is not as it was written, also after `faults.RETRY_SECONDS`.
        ConfigError: it cannot be read.
    """

    def read() -> dict:
        path = folder / "manifest.json"
        try:
            content = json.loads(path.read_bytes())
            check = content.pop("checksum")
        except (OSError, ValueError, KeyError) as error:
            raise _fault(path, error) from error
        if check != checksum(content):
            raise Damaged(path, "its checksum differs")
        for shard in content["train"]["shards"] + content["eval"]["shards"]:
            check_shard(folder, shard)
        return content

    return faults.retried(read, told=_told)


def _told(error: Exception) -> None:
    say(f"warning: {' '.join(str(error).split())}; trying again for {faults.RETRY_SECONDS:g} s")


def _fault(path: Path, error: Exception) -> ConfigError:
    """Damaged, where the file is there and is none of ours, or is not there; else what the system says."""
    code = faults.number(error)
    if code in (None, errno.ENOENT):
        return Damaged(path, "missing" if code else " ".join(str(error).split()))
    takes = "; takes one that this user may read" if code in faults.RIGHTS else ""
    return ConfigError(f"data.cache: {path} cannot be read ({os.strerror(code)}){takes}")


def check_shard(folder: Path, shard: dict) -> None:
    """Compares size and number of records, which costs no reading.

    Raises:
        Damaged: the file is missing, or they differ.
        ConfigError: it cannot be read.
    """
    path = folder / shard["file"]
    try:
        size = path.stat().st_size
        if size == shard["bytes"]:
            reader = open_shard(path)
            count = reader.num_records()
            if count == 0 and shard["records"]:  # also where the file cannot be read: this says why
                reader.read([0])
    except (OSError, RuntimeError, ValueError) as error:
        raise _fault(path, error) from error
    if size != shard["bytes"]:
        raise Damaged(path, f"{size} bytes, not {shard['bytes']}")
    if count != shard["records"]:
        raise Damaged(path, f"{count} records, not {shard['records']}")


def open_shard(path: Path):
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)


def write_shard(path: Path, records: list[np.ndarray]) -> dict:
    """Writes the records, whole or not at all. Returns the shard's entry in the manifest.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    digest = hashlib.sha256()
    partial = path.with_name(path.name + ".partial")
    try:
        writer = ArrayRecordWriter(str(partial), _OPTIONS)
        for record in records:
            content = record.tobytes()
            digest.update(content)
            writer.write(content)
        writer.close()
        shard = {"file": partial.name, "records": len(records), "bytes": partial.stat().st_size}
        check_shard(path.parent, shard)  # a full disk would show here at the latest
    except (RuntimeError, Damaged) as error:
        raise OSError(" ".join(str(error).split())) from None
    partial.replace(path)
    return shard | {"file": path.name, "sha256": digest.hexdigest()}
