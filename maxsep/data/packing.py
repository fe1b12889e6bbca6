"""From text to records: parts become files of tokens, in any number of processes; then they are packed, in order.

All of it happens in one folder that is renamed when it is complete. A split's progress file there is written with every
finished shard of records, and token files come whole or not at all: a preparation that was cut off goes on from there.
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

import numpy as np

from maxsep.config import ConfigError, cli
from maxsep.data import tokenizer
from maxsep.data.base_tokenizer import Unencodable
from maxsep.data.records import SHARD_TOKENS, check_shard, id_dtype, write_shard
from maxsep.output.durable import write_json

WRITE_TOKENS = 1 << 20  # tokens a worker holds before it writes them


def pack(
    folder: Path,
    split: str,
    read: Callable,
    parts: list,
    tokenizer_name: str,
    sequence_length: int,
    max_tokens: int | None,
    workers: int,
    progress: Callable[[str], None],
) -> dict:
    """Packs a split's parts, which `read` turns into texts, into shards below `folder`.

    Returns: the split's entry in the manifest (`shards`, `tokens`, `documents`); `counts`, int64 [vocab_size]: how
    often each id is predicted; `unknown`: how many pieces of its text have no token.
    """
    tokens_of = _TokenFiles(folder / split, read, parts, tokenizer_name)
    coder = _coder(tokenizer_name)
    state_file = folder / f"{split}-progress.json"
    state = _saved(state_file) or {"shards": [], "part": 0, "offset": 0, "tokens": 0, "counts": [0] * coder.vocab_size}
    shards, tokens, first_part = state["shards"], state["tokens"], state["part"]
    unknown = state.get("unknown", 0)
    counts = np.array(state["counts"], np.int64)

    def save_shard(length: int) -> None:
        """Writes the first records of the stream, `length` targets of them."""
        nonlocal stream
        starts = range(0, length, sequence_length)
        path = folder / f"{split}-{len(shards):05d}.array_record"
        shards.append(write_shard(path, [stream[i : min(i + sequence_length, length) + 1] for i in starts]))
        stream = stream[length:]

    shard_length = max(1, SHARD_TOKENS // sequence_length) * sequence_length
    stream = np.zeros(0, id_dtype(coder.vocab_size))
    waiting, waiting_tokens = [], 0  # what comes after the stream; joined to it once it makes a shard
    started, tokens_before = time.monotonic(), tokens
    for number, part in tokens_of.in_order(first_part, workers):
        # A resumed preparation counts the part it stopped in anew, so the state is that before the part.
        before = {"part": number, "tokens": tokens, "counts": counts, "unknown": unknown}
        length = len(part)
        part = part[: None if max_tokens is None else max_tokens - tokens]
        unknown += round(tokens_of.unknown(number) * len(part) / max(1, length))
        targets = part if tokens else part[1:]
        counts = counts + np.bincount(targets, minlength=coder.vocab_size)
        tokens += len(part)
        waiting.append(part[state["offset"] if number == first_part else 0 :])
        waiting_tokens += len(waiting[-1])
        if len(stream) + waiting_tokens > shard_length:
            stream = np.concatenate([stream, *waiting])
            waiting, waiting_tokens = [], 0
            while len(stream) > shard_length:
                save_shard(shard_length)
            before |= {"counts": before["counts"].tolist(), "offset": len(part) - len(stream), "shards": shards}
            write_json(state_file, before, indent=None)
            tokens_of.drop(number)
        rate = (tokens - tokens_before) / max(time.monotonic() - started, 1e-3)
        progress(f"  {split}: {tokens:,} tokens, part {number + 1} of {len(parts)}, {rate:,.0f} tokens/s")
        if tokens == max_tokens:
            break
    stream = np.concatenate([stream, *waiting])
    if len(stream) > 1:
        save_shard(len(stream) - 1)
    tokens_of.drop(len(parts))
    ends_inside = tokens == max_tokens and stream[-1] != coder.end_of_text
    documents = int(counts[coder.end_of_text]) + int(ends_inside)
    return {"shards": shards, "tokens": tokens, "documents": documents, "counts": counts, "unknown": unknown}


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
    """The tokens of every part, each in a file of its own until it is packed, and beside it how many it lacks."""

    _dropped = 0  # the parts before it have no file any more

    def __init__(self, prefix: Path, read: Callable, parts: list, tokenizer_name: str):
        self._paths = [prefix.with_name(f"{prefix.name}-part-{n:06d}.tokens") for n in range(len(parts))]
        self._jobs = [(read, part, tokenizer_name, path) for part, path in zip(parts, self._paths, strict=True)]
        self._dtype = id_dtype(_coder(tokenizer_name).vocab_size)

    def in_order(self, first: int, workers: int) -> Iterator[tuple[int, np.ndarray]]:
        """Number and tokens of the parts from `first` on; the workers are a few parts ahead."""
        numbers = range(first, len(self._jobs))
        if workers == 1:
            for number in numbers:
                _tokenise(*self._jobs[number])
                yield number, self._tokens(number)
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

    def unknown(self, number: int) -> int:
        """How many pieces of a part's text have no token."""
        path = _beside(self._paths[number])
        return int(path.read_text()) if path.exists() else 0

    def _result(self, number: int, future: concurrent.futures.Future) -> tuple[int, np.ndarray]:
        future.result()
        return number, self._tokens(number)

    def _tokens(self, number: int) -> np.ndarray:
        return np.fromfile(self._paths[number], self._dtype)

    def drop(self, stop: int) -> None:
        """Removes the files of the parts before `stop`: they are packed."""
        while self._dropped < stop:
            for path in (self._paths[self._dropped], _beside(self._paths[self._dropped])):
                path.unlink(missing_ok=True)
            self._dropped += 1


def _start_worker() -> None:
    """A worker leaves Ctrl-C to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_for_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _tokenise(read: Callable, part, tokenizer_name: str, path: Path) -> None:
    """Writes the part's tokens, each document's followed by the end of a text, unless that is done."""
    if path.exists():
        return
    coder = _coder(tokenizer_name)
    dtype = id_dtype(coder.vocab_size)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    ids, unknown = [], 0
    with open(partial, "wb") as file:
        for text, ends, at in read(part):
            if text:
                try:
                    found, without = coder.encode_and_count(text)
                except Unencodable as error:
                    raise ConfigError(f"data.tokenizer: {tokenizer_name} cannot encode {at} ({error})") from None
                ids += found
                unknown += without
                if ends:
                    ids.append(coder.end_of_text)
            if len(ids) > WRITE_TOKENS:
                file.write(np.array(ids, dtype).tobytes())
                ids.clear()
        file.write(np.array(ids, dtype).tobytes())
        os.fsync(file.fileno())
    if unknown:
        _beside(path).write_text(str(unknown))
    partial.replace(path)


def _beside(path: Path) -> Path:
    """Where it stands how many pieces of a part's text have no token, if any have none."""
    return path.with_suffix(".unknown")


_coder = functools.cache(tokenizer.load)
