"""The tokenizers that `data.tokenizer` names: GPT-2's BPE, whole or its first ids; bytes; a tokenizer.json."""

from collections.abc import Sequence

from maxsep.config import Config, ConfigError
from maxsep.config.validate import tokenizer_ids
from maxsep.data.base_tokenizer import Tokenizer, digest
from maxsep.data.gpt2_tokenizer import END_OF_TEXT, Gpt2Tokenizer
from maxsep.data.json_tokenizer import JsonTokenizer


def load(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `gpt2`, `gpt2:N`, `bytes`, or the path of a tokenizer.json.

    Raises:
        ConfigError: no such tokenizer, or a file that is none.
    """
    ids = tokenizer_ids(name)
    if ids is None:
        return JsonTokenizer(name)
    return ByteTokenizer() if name == "bytes" else Gpt2Tokenizer(ids)


def of(config: Config) -> Tokenizer:
    """As `load`, of a config.

    Raises:
        ConfigError: also where its model has too few ids.
    """
    found = load(config.data.tokenizer)
    if config.model.vocab_size < found.vocab_size:
        takes = f"at least {found.vocab_size}, as data.tokenizer is {config.data.tokenizer}"
        raise ConfigError(f"model.vocab_size: got {config.model.vocab_size}; takes {takes}")
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
