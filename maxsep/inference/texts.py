"""What a user hands to inference: prompts, and texts to score. Read and checked before JAX starts."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from maxsep.config import ConfigError, paths
from maxsep.data.base_tokenizer import Unencodable


class Prompt(NamedTuple):
    text: str
    ids: list[int]


def prompts(given: Sequence[str], file: str | None, tokenizer, context: int) -> list[Prompt]:
    """The prompts of the command line, of `file` (.txt: one a line; .jsonl), or else of standard input, one a line.

    Raises:
        ConfigError: there are none, one is empty or has more than `context` tokens, or the file cannot be read.
    """
    if given and file is not None:
        raise ConfigError("--prompts: got a file beside --prompt; takes one of the two")
    if given:
        found, name = list(given), "--prompt"
    elif file is not None:
        found, name = _of_file(file), f"--prompts: {file}"
    else:
        if sys.stdin.isatty():
            print("prompts, one per line, then the end of the input (Ctrl-D):", flush=True)
        found, name = _decoded(sys.stdin.buffer.read(), "standard input").splitlines(), "standard input"
    if not found:
        raise ConfigError(f"{name}: has no prompt; takes at least one")
    encoded = []
    for number, text in enumerate(found, 1):
        which = name if len(found) == 1 else f"{name}: prompt {number} of {len(found)}"
        if isinstance(text, str):
            ids = _encoded(which, text, tokenizer)
        else:
            ids = _ids(which, text, tokenizer)
            text = tokenizer.decode(ids)
        if not ids:
            raise ConfigError(f"{which}: got {_short(text)}, which is empty; takes at least one token")
        _fits(which, ids, context)
        encoded.append(Prompt(text, ids))
    return encoded


def to_score(file: str, tokenizer, context: int) -> list[list[int]]:
    """The ids of each line of `file`: {"text": …} or {"tokens": […]}.

    Raises:
        ConfigError: the file cannot be read, or a line is no such thing, is empty, has ids that do not exist, or more
            than `context` and one.
    """
    found = []
    for number, line in enumerate(_lines(file, "--score"), 1):
        where = f"--score: {file}:{number}"
        entry = _object(line, where, '{"text": …} or {"tokens": […]}')
        if ("text" in entry) == ("tokens" in entry):
            raise ConfigError(f'{where}: got {_short(line)}; takes {{"text": …}} or {{"tokens": […]}}')
        if "text" in entry:
            text = entry["text"]
            if not isinstance(text, str) or not text:
                raise ConfigError(f"{where}: got {_short(text)} as text; takes a string that is not empty")
            found.append(_encoded(where, text, tokenizer))
            continue
        found.append(_ids(where, entry["tokens"], tokenizer))
    if not found:
        raise ConfigError(f"--score: {file} is empty; takes at least one line")
    for number, ids in enumerate(found, 1):
        _fits(f"--score: {file}:{number}", ids[:-1], context, 1)  # nothing comes after the last
    return found


def _encoded(where: str, text: str, tokenizer) -> list[int]:
    try:
        ids, unknown = tokenizer.encode_and_count(text)
    except Unencodable as error:
        raise ConfigError(f"{where}: got {_short(text)}, which the run's tokenizer cannot encode ({error})") from None
    if text and not ids:
        raise ConfigError(f"{where}: got {_short(text)}, which has no token in the run's tokenizer; takes other text")
    if unknown:
        print(f"WARNING: {where}: {tokenizer.lacks(unknown, _short(text))}", file=sys.stderr, flush=True)
    return [*tokenizer.beginning, *ids]


def _ids(where: str, ids, tokenizer) -> list[int]:
    if not isinstance(ids, list) or not ids:
        raise ConfigError(f"{where}: got {_short(ids)} as tokens; takes a list of ids that is not empty")
    for token in ids:
        if type(token) is not int or not 0 <= token < tokenizer.vocab_size:
            takes = f"integers from 0 to {tokenizer.vocab_size - 1}, the tokenizer's ids"
            raise ConfigError(f"{where}: got {_short(token)} among the tokens; takes {takes}")
    return ids


def _fits(where: str, ids: list[int], context: int, more: int = 0) -> None:
    if len(ids) > context:
        takes = f"at most {context + more}, as the model was trained on sequences of {context}"
        raise ConfigError(f"{where}: got {len(ids) + more} tokens; takes {takes} (data.sequence_length)")


def _of_file(file: str) -> list[str | list]:
    suffix = Path(file).suffix
    if suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"--prompts: got {file}; takes a .txt file (a prompt per line) or a .jsonl file")
    lines = _lines(file, "--prompts")
    if suffix == ".txt":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        where = f"--prompts: {file}:{number}"
        entry = _object(line, where, '{"prompt": …} or {"tokens": […]}')
        prompt = entry.get("prompt", entry.get("tokens"))
        if not isinstance(prompt, str if "prompt" in entry else list):
            raise ConfigError(f'{where}: got {_short(line)}; takes {{"prompt": …}} with a string, or {{"tokens": […]}}')
        found.append(prompt)
    return found


def _lines(file: str, flag: str) -> list[str]:
    path = paths.named(flag, file)
    try:
        return _decoded(path.read_bytes(), f"{flag}: {file}").splitlines()
    except OSError as error:
        raise ConfigError(f"{flag}: got {file} ({error.strerror}); takes a file that this user may read") from None


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: byte {error.start} is not UTF-8; takes text in UTF-8") from None


def _object(line: str, where: str, takes: str) -> dict:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is not JSON ({error}); takes {takes}") from None
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: got {_short(line)}; takes {takes}")
    return entry


def _short(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= 60 else text[:57] + "…")
