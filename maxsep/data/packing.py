"""From text to records: parts become files of tokens (token_parts.py), which are packed in order.

All of it happens in one folder that is renamed when it is complete. The progress file there is written with every
finished shard of training records, and token files come whole or not at all: a preparation that was cut off goes on
from there. Held-out documents stay in their files to the end, and are packed from the highest place down.
"""

import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maxsep.data.base_tokenizer import Tokenizer
from maxsep.data.records import SHARD_TOKENS, check_shard, id_dtype, write_shard
from maxsep.data.splits import Sides
from maxsep.data.token_parts import TokenParts, coder
from maxsep.output.durable import write_json

PROGRESS = "train-progress.json"
PIECE_TOKENS = 1 << 20  # of held-out documents at once


class Packing(NamedTuple):
    """How tokens become records."""

    tokenizer: str  # as `data.tokenizer`
    sequence_length: int
    max_tokens: int | None  # to train on
    eval_max_tokens: int | None


def pack(
    folder: Path,
    read: Callable,
    parts: list[tuple[object, Sides]],
    how: Packing,
    workers: int,
    progress: Callable[[str], None],
) -> dict:
    """Packs parts, which `read` turns into documents, into shards below `folder`.

    Args:
        parts: each with its sides; those with training text come first.

    Returns: for `train` and `eval` the split's entry in the manifest (`shards`, `tokens`, `documents`); `counts`, int64
        [vocab_size]: how often each id is predicted; `unknown`: how many pieces of its text have no token. And `top`:
        the highest place of a training document.
    """
    files = TokenParts(folder, read, parts, how.tokenizer)
    train = _train(folder, files, how, workers, progress)
    read_parts = train.pop("parts")
    only_held_out = range(sum(bool(sides.train) for _, sides in parts), len(parts))
    for number in files.in_order(only_held_out, workers):
        progress(f"  eval: part {number + 1} of {len(parts)}")
    found = [files.about(number) for number in (*range(read_parts), *only_held_out)]
    top = max((about["top"] for about in found if about["top"] is not None), default=None)
    return {"train": train, "eval": _held_out(folder, files, found, how), "top": top}


def clean(folder: Path) -> None:
    """Removes what a preparation needs no more once it is complete, or is to begin anew."""
    for path in (folder / PROGRESS, *folder.glob("part-*")):  # the parts that it counts on go after it
        path.unlink(missing_ok=True)


def _train(folder: Path, files: TokenParts, how: Packing, workers: int, progress: Callable[[str], None]) -> dict:
    """Packs the training documents in their order. `parts`: how many were read."""
    encoder = coder(how.tokenizer)
    state_file = folder / PROGRESS
    start = {"shards": [], "part": 0, "offset": 0, "tokens": 0, "counts": [0] * encoder.vocab_size, "unknown": 0}
    state = _saved(state_file) or start
    tokens, first_part, unknown = state["tokens"], state["part"], state["unknown"]
    counts = np.array(state["counts"], np.int64)
    shards = _Shards(folder, "train", how, encoder, state["shards"])
    started, tokens_before, number = time.monotonic(), tokens, first_part - 1
    last = np.zeros(0, np.int32)
    training = range(first_part, sum(bool(sides.train) for _, sides in files.parts))
    for number in files.in_order(training, workers):
        # A resumed preparation counts the part it stopped in anew, so the state is that before the part.
        before = {"part": number, "tokens": tokens, "counts": counts, "unknown": unknown}
        part = files.train(number)
        length = len(part)
        part = part[: None if how.max_tokens is None else how.max_tokens - tokens]
        unknown += round(files.about(number)["unknown"][0] * len(part) / max(1, length))
        counts = counts + np.bincount(part if tokens else part[1:], minlength=encoder.vocab_size)
        tokens += len(part)
        last = part[-1:] if len(part) else last
        if shards.add(part[state["offset"] if number == first_part else 0 :]):
            offset = len(part) - len(shards.stream)
            before |= {"counts": before["counts"].tolist(), "offset": offset, "shards": shards.written}
            write_json(state_file, before, indent=None)
            files.drop(number)
        rate = (tokens - tokens_before) / max(time.monotonic() - started, 1e-3)
        progress(f"  train: {tokens:,} tokens, part {number + 1} of {len(files.parts)}, {rate:,.0f} tokens/s")
        if tokens == how.max_tokens:
            break
    shards.finish()
    return _entry(shards, tokens, counts, last, encoder) | {"unknown": unknown, "parts": number + 1}


def _held_out(folder: Path, files: TokenParts, found: list[dict], how: Packing) -> dict:
    """Packs the held-out documents from the highest place down, up to `eval_max_tokens`."""
    encoder = coder(how.tokenizer)
    shards = _Shards(folder, "eval", how, encoder, [])
    order = sorted(
        ((place, about["number"], stop - length, stop) for about in found for place, length, stop in about["eval"]),
        key=lambda item: (-item[0], item[1:]),
    )
    tokens, counts, last = 0, np.zeros(encoder.vocab_size, np.int64), np.zeros(0, np.int32)
    for piece in _joined(files, order):
        piece = piece[: None if how.eval_max_tokens is None else how.eval_max_tokens - tokens]
        counts += np.bincount(piece if tokens else piece[1:], minlength=encoder.vocab_size)
        tokens += len(piece)
        last = piece[-1:]
        shards.add(piece)
        if tokens == how.eval_max_tokens:
            break
    shards.finish()
    unknown = sum(about["unknown"][1] for about in found)
    whole = sum(length for about in found for _, length, _ in about["eval"])
    return _entry(shards, tokens, counts, last, encoder) | {"unknown": round(unknown * tokens / max(1, whole))}


def _joined(files: TokenParts, order: list[tuple]) -> Iterator[np.ndarray]:
    """Held-out documents in their order, many at a time."""
    held_out = functools.lru_cache(64)(files.held_out)
    pieces, tokens = [], 0
    for _, number, start, stop in order:
        pieces.append(held_out(number)[start:stop])
        tokens += stop - start
        if tokens >= PIECE_TOKENS:
            yield np.concatenate(pieces)
            pieces, tokens = [], 0
    if pieces:
        yield np.concatenate(pieces)


def _entry(shards: "_Shards", tokens: int, counts: np.ndarray, last: np.ndarray, encoder: Tokenizer) -> dict:
    ends_inside = bool(len(last)) and last[0] != encoder.end_of_text
    documents = int(counts[encoder.end_of_text]) + int(ends_inside)
    return {"shards": shards.written, "tokens": tokens, "documents": documents, "counts": counts}


class _Shards:
    """A split's stream of tokens, written in shards of records as it comes."""

    def __init__(self, folder: Path, split: str, how: Packing, encoder: Tokenizer, written: list[dict]):
        self._folder, self._split, self._sequence_length = folder, split, how.sequence_length
        self._length = max(1, SHARD_TOKENS // how.sequence_length) * how.sequence_length
        self.written = written
        self.stream = np.zeros(0, id_dtype(encoder.vocab_size))  # that no shard has
        self._waiting, self._waiting_tokens = [], 0  # what comes after it; joined to it once it makes a shard

    def add(self, tokens: np.ndarray) -> bool:
        """Takes what comes next. Whether a shard was written."""
        self._waiting.append(tokens)
        self._waiting_tokens += len(tokens)
        if len(self.stream) + self._waiting_tokens <= self._length:
            return False
        self._join()
        while len(self.stream) > self._length:
            self._write(self._length)
        return True

    def finish(self) -> None:
        self._join()
        if len(self.stream) > 1:
            self._write(len(self.stream) - 1)

    def _join(self) -> None:
        self.stream = np.concatenate([self.stream, *self._waiting])
        self._waiting, self._waiting_tokens = [], 0

    def _write(self, length: int) -> None:
        """Writes the first records of the stream, `length` targets of them."""
        starts = range(0, length, self._sequence_length)
        path = self._folder / f"{self._split}-{len(self.written):05d}.array_record"
        records = [self.stream[i : min(i + self._sequence_length, length) + 1] for i in starts]
        self.written.append(write_shard(path, records))
        self.stream = self.stream[length:]


def _saved(state_file: Path) -> dict | None:
    """The state of a preparation that was cut off, unless the machine lost some of it."""
    try:
        state = json.loads(state_file.read_bytes())
        for shard in state["shards"]:
            check_shard(state_file.parent, shard)
        return state
    except (OSError, ValueError):
        return None
