"""Hugging Face's tokenizer.json, held to what every tokenizer here promises."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from maxsep.config import ConfigError, paths
from maxsep.data.base_tokenizer import Tokenizer, Unencodable, digest
from maxsep.data.gpt2_tokenizer import END_OF_TEXT

# What tokenizer.json files call the end of a text, the commonest first, for those without a tokenizer_config.json.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>")


class JsonTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json.

    The end of a text is `eos_token` of the tokenizer_config.json beside it, or else the first of `END_NAMES` that the
    file has. A completion also ends with each `eos_token_id` of the generation_config.json beside it.
    """

    def __init__(self, path: str):
        try:
            content = paths.named("data.tokenizer", path).read_bytes()
        except OSError as error:
            takes = "gpt2, gpt2:N, bytes, or the path of a tokenizer.json"
            reason = os.strerror(error.errno) if error.errno else error
            raise ConfigError(f"data.tokenizer: got {path!r} ({reason}); takes {takes}") from None
        self._tokenizer = _parsed(path, content.decode(errors="replace"))
        self.ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.end_name = end = _end_name(path, self.ids)
        self.vocab_size = max(self.ids.values(), default=-1) + 1
        self.end_of_text = self.ids[end]
        self.stops = tuple(number for number in _stops(path) if number != self.end_of_text)
        self.fingerprint = digest(content + end.encode())
        fields = json.loads(content)
        for token in fields["added_tokens"]:
            if token["content"] == end and not token["special"]:  # then text that spells it would become it
                token["special"] = True
                self._tokenizer = _parsed(path, json.dumps(fields))
        self._model = self._tokenizer.model
        self._unknown_id = _unknown_id(fields["model"], self._model)
        if self._unknown_id is not None and self._unknown_id != self.end_of_text:
            self.unknown = self._model.id_to_token(self._unknown_id)
        added = self._tokenizer.get_added_tokens_decoder().items()
        special = {i for i, token in added if token.special} | {self.end_of_text}
        # Those among the model's own tokens: it may choose them for a text that spells them, whatever they mean.
        self._spelled = {i for i in special if self._model.id_to_token(i) is not None}
        if self.unknown:
            self._spelled.discard(self._unknown_id)
        self._may_leave_out = type(self._model).__name__ == "BPE" and not self.unknown  # others raise
        self._known = {c for c in map(chr, range(128)) if self._has_token(c)} if self._may_leave_out else set()
        self._knows_ascii = len(self._known) == 128
        self._ids_of = {}  # letters of spelled tokens
        self.beginning = _beginning(self._tokenizer)

    def _encode(self, text: str) -> tuple[list[int], int]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        ids = found.ids
        if not self._spelled.isdisjoint(ids) or (self.unknown and self.unknown in text):
            ids = list(self._respelled(text, zip(ids, found.offsets, strict=True)))
        if self._may_leave_out:
            return ids, self._left_out(text)
        return ids, ids.count(self._unknown_id) if self.unknown else 0

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _respelled(self, text: str, tokens: Iterator[tuple[int, tuple[int, int]]]) -> Iterator[int]:
        """The ids, with those that mean something else than their letters replaced by their letters' ids."""
        for i, (start, stop) in tokens:
            if i == self._unknown_id:
                # May be several pieces in a row, and among them the unknown token's own letters.
                for number, piece in enumerate(text[start:stop].split(self._model.id_to_token(i))):
                    if number:
                        yield from self._letters(i)
                    if self.unknown and (piece or start == stop):  # else a piece without a token would end the text
                        yield i
            elif i in self._spelled:
                yield from self._letters(i)
            else:
                yield i

    def _letters(self, token: int) -> list[int]:
        if token not in self._ids_of:
            self._ids_of[token] = self._ids_of_letters(token)
        return self._ids_of[token]

    def _ids_of_letters(self, token: int) -> list[int]:
        """The ids of text that spells a token, without that token."""
        name = self._model.id_to_token(token)
        found = [pieces for cut in range(1, len(name)) if (pieces := self._halves(name, cut))]
        whole = [pieces for pieces in found if "".join(piece.value for piece in pieces) == name]
        if found:
            return [piece.id for piece in (whole or found)[0]]
        if token != self.end_of_text:
            return [token]
        if self.unknown:
            return [self._unknown_id]
        raise Unencodable(f"the text spells {name!r}, the end of a text, which no other of its tokens do")

    def _halves(self, name: str, cut: int) -> list | None:
        """The model's tokens of the two halves, unless one is of a kind that may not be."""
        try:
            pieces = self._model.tokenize(name[:cut]) + self._model.tokenize(name[cut:])
        except Exception:  # how a model without an unknown token says that it knows no other
            return None
        ids = {piece.id for piece in pieces}
        return pieces if ids.isdisjoint(self._spelled | {self._unknown_id}) else None

    def _left_out(self, text: str) -> int:
        """How many characters have no token: such a BPE passes over them."""
        if self._knows_ascii and text.isascii():  # which costs nothing
            return 0
        rare = set(text) - self._known
        unknown = {character for character in rare if not self._has_token(character)}
        self._known |= rare - unknown
        return sum(map(text.count, unknown))

    def _has_token(self, character: str) -> bool:
        if character.isspace():  # which many leave out between words
            return True
        try:
            ids = self._tokenizer.encode(character, add_special_tokens=False).ids
        except Exception:  # such a one leaves nothing out: text with it is refused
            return False
        return bool(ids) and self.end_of_text not in ids


def _parsed(path: str, content: str):
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # its exceptions have no common class, and a panic is none
        reason = " ".join(str(error).split())
        raise ConfigError(f"data.tokenizer: got {path!r} ({reason}); takes a tokenizer.json") from None
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = True
    return found


def _beginning(tokenizer) -> tuple[int, ...]:
    """The ids that the file's post-processor puts before those of a text."""
    for text in ("a", "0", ".", "一"):
        try:
            alone, whole = (tokenizer.encode(text, add_special_tokens=special).ids for special in (False, True))
        except Exception:  # how a model without an unknown token says that it knows no such letter
            continue
        if alone:
            starts = [i for i in range(len(whole)) if whole[i : i + len(alone)] == alone]
            return tuple(whole[: starts[0]]) if starts else ()
    return ()


def _unknown_id(fields: dict, model) -> int | None:
    """The id that the model, of which `fields` is the description, has for what it does not know."""
    if fields.get("unk_id") is not None:
        return fields["unk_id"]
    name = fields.get("unk_token")
    return None if name is None else model.token_to_id(name)


def _beside(path: str, name: str, field: str):
    """A field of a JSON file beside a tokenizer.json; None where there is no such file."""
    beside = Path(path).with_name(name)
    try:
        return json.loads(beside.read_bytes()).get(field) if beside.exists() else None
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"data.tokenizer: {str(beside)!r} beside it is not a JSON object") from None


def _stops(path: str) -> list[int]:
    name = "generation_config.json"
    try:
        return end_ids(_beside(path, name, "eos_token_id"))
    except ValueError as error:
        raise ConfigError(f"data.tokenizer: {str(Path(path).with_name(name))!r} beside it: {error}") from None


def end_ids(value) -> list[int]:
    """The ids of an `eos_token_id`: a number, a list of some, or null.

    Raises:
        ValueError: it is something else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int for number in ids):
        raise ValueError(f"eos_token_id: got {str(value)[:80]}; takes an id, or a list of ids")
    return list(dict.fromkeys(number for number in ids if number >= 0))


def _end_name(path: str, ids: dict[str, int]) -> str:
    end = _beside(path, "tokenizer_config.json", "eos_token")
    if isinstance(end, dict):
        end = end.get("content")
    for name in (end, *END_NAMES):
        if isinstance(name, str) and name in ids:
            return name
    takes = f"one with an end of text: eos_token in tokenizer_config.json beside it, or one of {', '.join(END_NAMES)}"
    raise ConfigError(f"data.tokenizer: got {path!r}; takes {takes}")
