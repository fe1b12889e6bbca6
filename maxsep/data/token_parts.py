"""Parts of a text as files of tokens, made by any number of processes. Each comes whole or not at all."""

import collections
import concurrent.futures
import functools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from maxsep.config import ConfigError, cli
from maxsep.data import tokenizer
from maxsep.data.base_tokenizer import Tokenizer, Unencodable
from maxsep.data.records import id_dtype
from maxsep.data.splits import Document, Sides
from maxsep.output.durable import write_json

WRITE_TOKENS = 1 << 20  # tokens a worker holds before it writes them
PIECE = 1 << 20  # tokens that are packed at once
coder = functools.cache(tokenizer.load)


class TokenParts:
    """The tokens of every part: of training in `.train`, to be packed, and of held-out documents in `.eval`.

    A `.json` beside them, which comes last, tells what they hold, as `_tokenise` says.
    """

    _dropped = 0  # the parts before it have no training tokens any more

    def __init__(self, folder: Path, read: Callable, parts: list[tuple[object, Sides]], tokenizer_name: str):
        self.parts = parts
        self._paths = [folder / f"part-{n:06d}.json" for n in range(len(parts))]
        self._jobs = [(read, *part, tokenizer_name, path) for part, path in zip(parts, self._paths, strict=True)]
        self._dtype = id_dtype(coder(tokenizer_name).vocab_size)

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

    def length(self, number: int) -> int:
        """Training tokens of the part."""
        return self._paths[number].with_suffix(".train").stat().st_size // self._dtype.itemsize

    def train(self, number: int, most: int | None) -> Iterator[np.ndarray]:
        """The part's training tokens, up to `most`, in pieces: those of a large file may not fit in memory."""
        with open(self._paths[number].with_suffix(".train"), "rb") as file:
            left = self.length(number) if most is None else most
            while left and len(piece := np.fromfile(file, self._dtype, min(left, PIECE))):
                left -= len(piece)
                yield piece

    def held_out(self, number: int) -> np.ndarray:
        """The part's held-out tokens, of which there are some."""
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
    encoder = coder(tokenizer_name)
    unknown, held_out, top = {"train": 0, "eval": 0}, [], None
    with _Writer(path, "train", encoder) as train, _Writer(path, "eval", encoder) as evaluated:
        for document in read(part):
            side = sides.of(document.place)
            if side is None or not len(document.content):
                continue
            ids, without = _ids(encoder, tokenizer_name, document)
            unknown[side] += without
            if side == "train":
                ends = sides.of(document.following) != "train"
                top = document.place if top is None else max(top, document.place)
                train.write(ids, ends)
            else:
                evaluated.write(ids, True)
                held_out.append((document.place, len(ids) + 1, evaluated.tokens))
    write_json(path, {"unknown": list(unknown.values()), "eval": held_out, "top": top}, indent=None)


def _ids(encoder: Tokenizer, name: str, document: Document) -> tuple[np.ndarray | list[int], int]:
    """The document's ids, and how many pieces of its text have none."""
    if not isinstance(document.content, str):
        return document.content, 0
    try:
        return encoder.encode_and_count(document.content)
    except Unencodable as error:
        raise ConfigError(f"data.tokenizer: {name} cannot encode {document.at} ({error})") from None


class _Writer:
    """A file of ids that comes whole or not at all."""

    def __init__(self, beside: Path, name: str, encoder: Tokenizer):
        self._path = beside.with_suffix(f".{name}")
        self._partial = beside.with_suffix(f".{name}.{os.getpid()}.partial")
        self._end = np.array([encoder.end_of_text], id_dtype(encoder.vocab_size))
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
