"""The tokenizer beside a model's weights: carried along at an import, written at an export."""

import json
from collections.abc import Iterator
from pathlib import Path

from maxsep.data.base_tokenizer import Tokenizer
from maxsep.data.gpt2_tokenizer import END_OF_TEXT, Gpt2Tokenizer, vocabulary_and_merges
from maxsep.data.json_tokenizer import JsonTokenizer, end_ids
from maxsep.huggingface.folder import Folder

MAIN, SETTINGS = "tokenizer.json", "tokenizer_config.json"
GENERATION = "generation_config.json"  # of which the ids that end a completion are read
OTHERS = ("special_tokens_map.json", GENERATION)  # carried along
FAST = "PreTrainedTokenizerFast"  # the class of transformers that reads any tokenizer.json


def carried(folder: Folder, ends: list[int]) -> dict[str, bytes]:
    """The files that a run keeps of a folder's tokenizer, by name; none where the folder has no tokenizer.json.

    Args:
        folder: of the model.
        ends: the ids that end a text, as config.json and generation_config.json say. The first counts where
            tokenizer_config.json has no name of it; the others end completions.

    Raises:
        ConfigError: one of the files is not JSON, or leads out of the folder.
    """
    tokenizer = folder.json(MAIN)
    if tokenizer is None:
        return {}
    settings = folder.json(SETTINGS) or {}
    if settings.get("eos_token") is None and ends:
        settings["eos_token"] = next((name for name, number in _names(tokenizer) if number == ends[0]), None)
    others = (name for name in OTHERS if folder.json(name) is not None)
    # Those that nothing is added to stay as they are: a hash tells which tokenizer a run has.
    files = {name: (folder.path / name).read_bytes() for name in (MAIN, *others)} | {SETTINGS: _json(settings)}
    generation = folder.json(GENERATION) or {}
    if len(ends) > 1 and set(end_ids(generation.get("eos_token_id"))) != set(ends):
        files[GENERATION] = _json(generation | {"eos_token_id": ends})
    return files


def _names(tokenizer: dict) -> Iterator[tuple]:
    """The tokens and ids of a tokenizer.json."""
    for token in tokenizer.get("added_tokens") or []:
        if isinstance(token, dict):
            yield token.get("content"), token.get("id")
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()


def written(tokenizer: Tokenizer, path: str) -> dict[str, bytes]:
    """The files that transformers reads a run's tokenizer from, by name; none for one that has no such form.

    Args:
        tokenizer: the run's.
        path: `data.tokenizer`.

    Raises:
        ConfigError: a file beside a tokenizer.json is not JSON.
    """
    if isinstance(tokenizer, Gpt2Tokenizer):
        return {MAIN: _gpt2(tokenizer), SETTINGS: _json({"tokenizer_class": FAST, "eos_token": END_OF_TEXT})}
    if not isinstance(tokenizer, JsonTokenizer):
        return {}
    beside = Folder(str(Path(path).parent), "data.tokenizer")
    settings = {"tokenizer_class": FAST} | (beside.json(SETTINGS) or {})
    if settings.get("eos_token") is None:
        settings["eos_token"] = tokenizer.end_name
    others = {name: (beside.path / name).read_bytes() for name in OTHERS if beside.json(name) is not None}
    return {MAIN: Path(path).read_bytes(), SETTINGS: _json(settings)} | others


def beginning(tokenizer: Tokenizer, files: dict[str, bytes]) -> int | None:
    """The id of `bos_token` in a tokenizer's files; None where there is none."""
    if not isinstance(tokenizer, JsonTokenizer):
        return None
    name = json.loads(files[SETTINGS]).get("bos_token")
    name = name.get("content") if isinstance(name, dict) else name
    return tokenizer.ids.get(name) if isinstance(name, str) else None


def write(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _json(values: dict) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _gpt2(tokenizer: Gpt2Tokenizer) -> bytes:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    fast = Fast(models.BPE(*vocabulary_and_merges(tokenizer.vocab_size)))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return fast.to_str(pretty=True).encode()
