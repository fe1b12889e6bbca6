"""The tokenizers that `data.tokenizer` names: GPT-2's BPE, whole or its first ids; bytes; ids; a tokenizer.json."""

from collections.abc import Sequence

from maxsep.config import Config, ConfigError
from maxsep.config.validate import tokenizer_ids
from maxsep.data.base_tokenizer import NO_END, Tokenizer, Unencodable, digest
from maxsep.data.gpt2_tokenizer import END_OF_TEXT, Gpt2Tokenizer
from maxsep.data.json_tokenizer import JsonTokenizer


def load(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `gpt2`, `gpt2:N`, `bytes`, `ids:N`, or the path of a tokenizer.json.

    Raises:
        ConfigError: no such tokenizer, or a file that is none.
    """
    ids = tokenizer_ids(name)
    if ids is None:
        return JsonTokenizer(name)
    if name.startswith("ids:"):
        return IdTokenizer(name, ids)
    return ByteTokenizer() if name == "bytes" else Gpt2Tokenizer(ids)


def of(config: Config) -> Tokenizer:
    """As `load`, of a config, and with a `beginning` only where it says so.

    Raises:
        ConfigError: also where its model has too few ids.
    """
    found = load(config.data.tokenizer)
    if config.model.vocab_size < found.vocab_size:
        takes = f"at least {found.vocab_size}, as data.tokenizer is {config.data.tokenizer}"
        raise ConfigError(f"model.vocab_size: got {config.model.vocab_size}; takes {takes}")
    if not config.data.begin_prompts:
        found.beginning = ()
    return found


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as they are, and 256 for the end of a text."""

    vocab_size = 257
    end_of_text = 256
    fingerprint = digest(b"bytes")

    def _encode(self, text: str) -> tuple[list[int], int]:
        return list(text.encode()), 0

    def decode(self, ids: Sequence[int]) -> str:
        pieces = (END_OF_TEXT.encode() if i == self.end_of_text else bytes([i]) for i in ids)
        return b"".join(pieces).decode(errors="replace")


class IdTokenizer(Tokenizer):
    """For a model whose tokenizer is not known: text is ids as numbers, `17 4 256`.

    The third part of its name, as 2 in `ids:32000:2`, is the id that ends a text; without one no text ends. In
    `ids:32000:2,45` a completion ends with 45 too.
    """

    def __init__(self, name: str, vocab_size: int):
        _, _, *end = name.split(":")
        ends = [int(number) for number in end[0].split(",")] if end else [NO_END]
        self.vocab_size, self.end_of_text, self.stops = vocab_size, ends[0], tuple(ends[1:])
        self.fingerprint = digest(name.partition(",")[0].encode())

    def _encode(self, text: str) -> tuple[list[int], int]:
        ids = []
        for word in text.split():
            if not (word.isascii() and word.isdecimal() and int(word) < self.vocab_size):
                raise Unencodable(f"{word[:20]!r} is no id below {self.vocab_size}, and this model takes ids alone")
            ids.append(int(word))
        return ids, 0

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))
