"""What all tokenizers have in common."""

import abc
import hashlib

NO_END = -1  # no id


class Unencodable(ValueError):
    """Text that a tokenizer has no ids for; the message is the reason."""


class Tokenizer(abc.ABC):
    """Text to token ids and back. Text that spells a special token is encoded as any other.

    `vocab_size`; `end_of_text`: the id that ends a document, or `NO_END`; `fingerprint`: a hash of what decides the
    ids; `unknown`: the token that stands for what has none, None where such pieces are left out, or cannot be;
    `beginning`: ids that come before a prompt's; `stops`: ids that end a completion too, as a turn of a chat.
    """

    vocab_size: int
    end_of_text: int
    fingerprint: str
    unknown: str | None = None
    beginning: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()

    @property
    def ends(self) -> list[int]:
        """The ids that a completion ends with."""
        return [end for end in (self.end_of_text, *self.stops) if end != NO_END]

    def encode(self, text: str) -> list[int]:
        """The text's ids.

        Raises:
            Unencodable: whatever the tokenizer's library raises, a panic too.
        """
        return self.encode_and_count(text)[0]

    def encode_and_count(self, text: str) -> tuple[list[int], int]:
        """As `encode`; also how many pieces of the text have no token."""
        try:
            return self._encode(text)
        except (Unencodable, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # these libraries raise all kinds, and a panic is no Exception
            raise Unencodable(" ".join(str(error).split()) or type(error).__name__) from None

    def lacks(self, pieces: int, text: str) -> str:
        """In words, that so many pieces of the text have no token."""
        what, are, has, become = (
            ("piece", "is", "has", "becomes") if pieces == 1 else ("pieces", "are", "have", "become")
        )
        fate = f"{become} {self.unknown}" if self.unknown else f"{are} left out"
        return f"{pieces:,} {what} of {text} {has} no token and {fate}"

    @abc.abstractmethod
    def _encode(self, text: str) -> tuple[list[int], int]: ...

    @abc.abstractmethod
    def decode(self, ids) -> str: ...


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
