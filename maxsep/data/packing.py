"""From text to records: parts become files of tokens (token_parts.py), which are packed in order.

All of it happens in one folder that is renamed when it is complete. The progress file there is written with every
finished shard of training records, and token files come whole or not at all: a preparation that was cut off resumes
from there. Held-out documents stay in their files to the end, and are packed from the highest place down.
"""

import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maxsep.data.records import SHARD_TOKENS, check_shard, id_dtype, write_shard
from maxsep.data.splits import Sides
from maxsep.data.token_parts import PIECE, TokenParts, coder
from maxsep.output.durable import write_json

PROGRESS = "train-progress.json"


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
    state_file = folder / PROGRESS
    state = _saved(state_file) or {"shards": [], "part": 0, "offset": 0, "tokens": 0, "counts": None, "unknown": 0}
    first_part, unknown = state["part"], state["unknown"]
    split = _Split(folder, "train", how, state["shards"], state["tokens"], state["counts"])
    started, tokens_before, number = time.monotonic(), split.tokens, first_part - 1
    training = range(first_part, sum(bool(sides.train) for _, sides in files.parts))
    for number in files.in_order(training, workers):
        # A resumed preparation counts the part it stopped in anew, so the state is that before the part.
        before = {"part": number, "tokens": split.tokens, "counts": split.counts.tolist(), "unknown": unknown}
        packed = state["offset"] if number == first_part else 0  # of the part, by the preparation that was cut off
        length, most = 0, None if how.max_tokens is None else how.max_tokens - split.tokens
        wrote = False
        for piece in files.train(number, most):
            split.count(piece)
            wrote |= split.add(piece[max(0, packed - length) :])
            length += len(piece)
        unknown += round(files.about(number)["unknown"][0] * length / max(1, files.length(number)))
        if wrote:
            after = {"offset": length - len(split.stream) - split.waiting, "shards": split.shards}
            write_json(state_file, before | after, indent=None)
            files.drop(number)
        rate = (split.tokens - tokens_before) / max(time.monotonic() - started, 1e-3)
        progress(f"  train: {split.tokens:,} tokens, part {number + 1} of {len(files.parts)}, {rate:,.0f} tokens/s")
        if split.tokens == how.max_tokens:
            break
    return split.finish() | {"unknown": unknown, "parts": number + 1}


def _held_out(folder: Path, files: TokenParts, found: list[dict], how: Packing) -> dict:
    """Packs the held-out documents from the highest place down, up to `eval_max_tokens`."""
    split = _Split(folder, "eval", how, [], 0, None)
    order = sorted(
        ((place, about["number"], stop - length, stop) for about in found for place, length, stop in about["eval"]),
        key=lambda item: (-item[0], item[1:]),
    )
    for piece in _joined(files, order):
        piece = piece[: None if how.eval_max_tokens is None else how.eval_max_tokens - split.tokens]
        split.count(piece)
        split.add(piece)
        if split.tokens == how.eval_max_tokens:
            break
    unknown = sum(about["unknown"][1] for about in found)
    whole = sum(length for about in found for _, length, _ in about["eval"])
    return split.finish() | {"unknown": round(unknown * split.tokens / max(1, whole))}


def _joined(files: TokenParts, order: list[tuple]) -> Iterator[np.ndarray]:
    """Held-out documents in their order, many at a time."""
    held_out = functools.lru_cache(64)(files.held_out)
    pieces, tokens = [], 0
    for _, number, start, stop in order:
        pieces.append(held_out(number)[start:stop])
        tokens += stop - start
        if tokens >= PIECE:
            yield np.concatenate(pieces)
            pieces, tokens = [], 0
    if pieces:
        yield np.concatenate(pieces)


class _Split:
    """A split's stream of tokens, counted and written in shards of records as it comes."""

    def __init__(self, folder: Path, name: str, how: Packing, shards: list[dict], tokens: int, counts: list | None):
        encoder = coder(how.tokenizer)
        self._folder, self._name, self._sequence_length = folder, name, how.sequence_length
        self._length = max(1, SHARD_TOKENS // how.sequence_length) * how.sequence_length
        self.shards, self.tokens = shards, tokens
        self.counts = np.zeros(encoder.vocab_size, np.int64) if counts is None else np.array(counts, np.int64)
        self._end, self._last = encoder.end_of_text, encoder.end_of_text
        self.stream = np.zeros(0, id_dtype(encoder.vocab_size))  # that no shard has
        self._waiting, self.waiting = [], 0  # what comes after it, joined to it once it makes a shard; its tokens

    def count(self, tokens: np.ndarray) -> None:
        """Counts what comes next: the first token of all is not predicted."""
        if len(tokens):
            self.counts += np.bincount(tokens if self.tokens else tokens[1:], minlength=len(self.counts))
            self.tokens, self._last = self.tokens + len(tokens), tokens[-1]

    def add(self, tokens: np.ndarray) -> bool:
        """Takes what comes next. Whether a shard was written."""
        self._waiting.append(tokens)
        self.waiting += len(tokens)
        if len(self.stream) + self.waiting <= self._length:
            return False
        self._join()
        while len(self.stream) > self._length:
            self._write(self._length)
        return True

    def finish(self) -> dict:
        """Writes the rest. Returns the split's entry in the manifest, and `counts`."""
        self._join()
        if len(self.stream) > 1:
            self._write(len(self.stream) - 1)
        documents = int(self.counts[self._end]) + int(self._last != self._end)
        return {"shards": self.shards, "tokens": self.tokens, "documents": documents, "counts": self.counts}

    def _join(self) -> None:
        self.stream = np.concatenate([self.stream, *self._waiting])
        self._waiting, self.waiting = [], 0

    def _write(self, length: int) -> None:
        """Writes the first records of the stream, `length` targets of them."""
        starts = range(0, length, self._sequence_length)
        path = self._folder / f"{self._name}-{len(self.shards):05d}.array_record"
        records = [self.stream[i : min(i + self._sequence_length, length) + 1] for i in starts]
        self.shards.append(write_shard(path, records))
        self.stream = self.stream[length:].copy()  # and not the whole of it


def _saved(state_file: Path) -> dict | None:
    """The state of a preparation that was cut off, unless the machine lost some of it."""
    try:
        state = json.loads(state_file.read_bytes())
        for shard in state["shards"]:
            check_shard(state_file.parent, shard)
        return state
    except (OSError, ValueError):
        return None
