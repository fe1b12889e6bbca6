"""From text to records: parts become files of tokens, in any number of processes; then they are packed, in order.

All of it happens in one folder that is renamed when it is complete. The progress file there is written with every
finished shard of training records, and token files come whole or not at all: a preparation that was cut off goes on
from there. Held-out documents stay in their files to the end, and are packed from the highest place down.
"""

import collections
import concurrent.futures
import functools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maxsep.config import ConfigError, cli
from maxsep.data import tokenizer
from maxsep.data.base_tokenizer import Tokenizer, Unencodable
from maxsep.data.records import SHARD_TOKENS, check_shard, id_dtype, write_shard
from maxsep.data.splits import Document, Sides
from maxsep.output.durable import write_json

WRITE_TOKENS = 1 << 20  # tokens a worker holds before it writes them
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
    files = _TokenFiles(folder, read, parts, how.tokenizer)
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


def _train(folder: Path, files: "_TokenFiles", how: Packing, workers: int, progress: Callable[[str], None]) -> dict:
    """Packs the training documents in their order. `parts`: how many were read."""
    coder = _coder(how.tokenizer)
    state_file = folder / PROGRESS
    start = {"shards": [], "part": 0, "offset": 0, "tokens": 0, "counts": [0] * coder.vocab_size, "unknown": 0}
    state = _saved(state_file) or start
    tokens, first_part, unknown = state["tokens"], state["part"], state["unknown"]
    counts = np.array(state["counts"], np.int64)
    shards = _Shards(folder, "train", how, coder, state["shards"])
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
        counts = counts + np.bincount(part if tokens else part[1:], minlength=coder.vocab_size)
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
    return _entry(shards, tokens, counts, last, coder) | {"unknown": unknown, "parts": number + 1}


def _held_out(folder: Path, files: "_TokenFiles", found: list[dict], how: Packing) -> dict:
    """Packs the held-out documents from the highest place down, up to `eval_max_tokens`."""
    coder = _coder(how.tokenizer)
    shards = _Shards(folder, "eval", how, coder, [])
    order = sorted(
        ((place, about["number"], stop - length, stop) for about in found for place, length, stop in about["eval"]),
        key=lambda item: (-item[0], item[1:]),
    )
    tokens, counts, last = 0, np.zeros(coder.vocab_size, np.int64), np.zeros(0, np.int32)
    held_out = functools.lru_cache(64)(files.held_out)
    for _, number, start, stop in order:
        document = held_out(number)[start:stop]
        document = document[: None if how.eval_max_tokens is None else how.eval_max_tokens - tokens]
        counts += np.bincount(document if tokens else document[1:], minlength=coder.vocab_size)
        tokens += len(document)
        last = document[-1:]
        shards.add(document)
        if tokens == how.eval_max_tokens:
            break
    shards.finish()
    unknown = sum(about["unknown"][1] for about in found)
    whole = sum(length for about in found for _, length, _ in about["eval"])
    return _entry(shards, tokens, counts, last, coder) | {"unknown": round(unknown * tokens / max(1, whole))}


def _entry(shards: "_Shards", tokens: int, counts: np.ndarray, last: np.ndarray, coder: Tokenizer) -> dict:
    ends_inside = bool(len(last)) and last[0] != coder.end_of_text
    documents = int(counts[coder.end_of_text]) + int(ends_inside)
    return {"shards": shards.written, "tokens": tokens, "documents": documents, "counts": counts}


class _Shards:
    """A split's stream of tokens, written in shards of records as it comes."""

    def __init__(self, folder: Path, split: str, how: Packing, coder: Tokenizer, written: list[dict]):
        self._folder, self._split, self._sequence_length = folder, split, how.sequence_length
        self._length = max(1, SHARD_TOKENS // how.sequence_length) * how.sequence_length
        self.written = written
        self.stream = np.zeros(0, id_dtype(coder.vocab_size))  # that no shard has
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


class _TokenFiles:
    """The tokens of every part: of training in `.train`, to be packed, and of held-out documents in `.eval`.

    A `.json` beside them, which comes last, tells what they hold: docs at `_tokenise`.
    """

    _dropped = 0  # the parts before it have no training tokens any more

    def __init__(self, folder: Path, read: Callable, parts: list[tuple[object, Sides]], tokenizer_name: str):
        self.parts = parts
        self._paths = [folder / f"part-{n:06d}.json" for n in range(len(parts))]
        self._jobs = [(read, *part, tokenizer_name, path) for part, path in zip(parts, self._paths, strict=True)]
        self._dtype = id_dtype(_coder(tokenizer_name).vocab_size)

    def in_order(self, numbers: range, workers: int) -> Iterator[int]:
        """The parts, each when it is tokenised; the workers are a few parts ahead."""
        if workers == 1 or len(numbers) < 2:
            for number in numbers:
                _tokenise(*self._jobs[number])
                yield number
            return
        # Not forked: whoever calls may have threads.
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start_worker)
        try:
            ahead = collections.deque()
            for number in numbers:
                ahead.append((number, pool.submit(_tokenise, *self._jobs[number])))
                if len(ahead) > 2 * workers:
                    yield self._result(*ahead.popleft())
            while ahead:
                yield self._result(*ahead.popleft())
        except concurrent.futures.BrokenExecutor:
            why = "one of them was killed (out of memory?)"
            kept = "what is finished is kept"
            raise cli.Exit(cli.USER_ERROR, f"--workers: got {workers}, but {why}; takes fewer ({kept})") from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _result(self, number: int, future: concurrent.futures.Future) -> int:
        future.result()
        return number

    def about(self, number: int) -> dict:
        return json.loads(self._paths[number].read_bytes()) | {"number": number}

    def train(self, number: int) -> np.ndarray:
        return np.fromfile(self._paths[number].with_suffix(".train"), self._dtype)

    def held_out(self, number: int) -> np.ndarray:
        return np.memmap(self._paths[number].with_suffix(".eval"), self._dtype, "r")

    def drop(self, stop: int) -> None:
        """Removes the training tokens of the parts before `stop`: they are packed."""
        while self._dropped < stop:
            self._paths[self._dropped].with_suffix(".train").unlink(missing_ok=True)
            self._dropped += 1


def _start_worker() -> None:
    """A worker leaves Ctrl-C to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_for_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _tokenise(read: Callable, part, sides: Sides, tokenizer_name: str, path: Path) -> None:
    """Writes the part's tokens, each document's followed by the end of a text, unless that is done.

    `path` gets JSON: `unknown`, the pieces that have no token, of training and of held-out text; `eval`, of each
    held-out document its place, its number of tokens, and where it ends in `.eval`; `top`, the highest place of a
    training document.
    """
    if path.exists() and path.with_suffix(".train").exists():
        return
    coder = _coder(tokenizer_name)
    unknown, held_out, top = {"train": 0, "eval": 0}, [], None
    with _Writer(path, "train", coder) as train, _Writer(path, "eval", coder) as evaluated:
        for document in read(part):
            side = sides.of(document.place)
            if side is None or not len(document.content):
                continue
            ids, without = _ids(coder, tokenizer_name, document)
            unknown[side] += without
            if side == "train":
                ends = sides.of(document.following) != "train"
                top = document.place if top is None else max(top, document.place)
                train.write(ids, ends)
            else:
                evaluated.write(ids, True)
                held_out.append((document.place, len(ids) + 1, evaluated.tokens))
    write_json(path, {"unknown": list(unknown.values()), "eval": held_out, "top": top}, indent=None)


def _ids(coder: Tokenizer, name: str, document: Document) -> tuple[np.ndarray | list[int], int]:
    """The document's ids, and how many pieces of its text have none."""
    if not isinstance(document.content, str):
        return document.content, 0
    try:
        return coder.encode_and_count(document.content)
    except Unencodable as error:
        raise ConfigError(f"data.tokenizer: {name} cannot encode {document.at} ({error})") from None


class _Writer:
    """A file of ids that comes whole or not at all."""

    def __init__(self, beside: Path, name: str, coder: Tokenizer):
        self._path = beside.with_suffix(f".{name}")
        self._partial = beside.with_suffix(f".{name}.{os.getpid()}.partial")
        self._end = np.array([coder.end_of_text], id_dtype(coder.vocab_size))
        self._waiting, self._waiting_tokens = [], 0
        self.tokens = 0

    def __enter__(self):
        self._file = open(self._partial, "wb")
        return self

    def write(self, ids: np.ndarray | list[int], ends: bool) -> None:
        self._waiting.append(np.asarray(ids, self._end.dtype))
        if ends:
            self._waiting.append(self._end)
        self._waiting_tokens += len(ids) + ends
        self.tokens += len(ids) + ends
        if self._waiting_tokens > WRITE_TOKENS:
            self._flush()

    def _flush(self) -> None:
        for ids in self._waiting:
            self._file.write(ids.data)
        self._waiting, self._waiting_tokens = [], 0

    def __exit__(self, kind, *_):
        with self._file:
            if kind is None:
                self._flush()
                os.fsync(self._file.fileno())
        if kind is None:
            self._partial.replace(self._path)


_coder = functools.cache(tokenizer.load)
