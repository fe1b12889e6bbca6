"""What every tokenizer promises, of tokenizer.json files of all kinds, made here."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from maxsep.data import tokenizer
from maxsep.data.base_tokenizer import Unencodable
from maxsep.data.json_tokenizer import JsonTokenizer

LETTERS = [*string.ascii_lowercase, *"<>/|[]"]
WORDS = ["the", "cat", "and"]
SPECIAL = ["</s>", "<pad>"]
SPELLED = ["</s>", "<pad>", "<unk>", "x</s>y", "</s></s>", "<</s>>"]


def unigram(unknown="<unk>"):
    vocabulary = [("<unk>", 0.0), *((name, -1.0) for name in SPECIAL), *((c, -4.0) for c in [*LETTERS, "▁"])]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=0 if unknown else None))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def bpe(unknown=None, characters=(*LETTERS, " ")):
    names = [*SPECIAL, "<unk>", *characters]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token=unknown))
    made.decoder = decoders.Fuse()
    return made


def byte_bpe():
    made = bpe(characters=pre_tokenizers.ByteLevel.alphabet())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def word_level(unknown="<unk>"):
    names = [*SPECIAL, *WORDS, *(["<unk>"] if unknown else [])]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def load(made, folder, special=SPECIAL):
    made.add_special_tokens(special)
    path = folder / "tokenizer.json"
    made.save(str(path))
    return tokenizer.load(str(path))


@pytest.fixture(scope="module")
def coders(tmp_path_factory):
    """By name, those of which a text comes back."""
    made = {"unigram": unigram(), "bpe": bpe(), "byte_bpe": byte_bpe()}
    coders = {name: load(one, tmp_path_factory.mktemp(name)) for name, one in made.items()}
    odd = byte_bpe()
    odd.add_tokens([AddedToken("</s>", special=False, normalized=False)])
    return coders | {"an end that is not marked special": load(odd, tmp_path_factory.mktemp("odd"), special=["<pad>"])}


@pytest.mark.parametrize("name", ["unigram", "bpe", "byte_bpe", "an end that is not marked special"])
@given(parts=st.lists(st.one_of(st.sampled_from([*SPELLED, *WORDS]), st.text("ab</s> >", max_size=5))))
def test_text_that_spells_special_tokens_is_text(coders, name, parts):
    coder, text = coders[name], "".join(parts)
    ids, unknown = coder.encode_and_count(text)
    assert not {coder.end_of_text, 1} & set(ids) and not unknown
    assert coder.decode(ids).strip(" ") == text.strip(" ")  # Metaspace has its own mind about blanks at the ends


def test_a_spelled_end_is_an_unknown_word_where_words_are_all_there_is(tmp_path):
    coder = load(word_level(), tmp_path)
    ids, unknown = coder.encode_and_count("the </s> cat dog </s>")
    names = {i: name for name, i in coder._tokenizer.get_vocab().items()}
    assert [names[i] for i in ids] == ["the", "<unk>", "cat", "<unk>", "<unk>"] and unknown == 3


def test_a_spelled_end_that_nothing_else_spells_is_refused(tmp_path):
    coder = load(bpe(characters="x"), tmp_path)
    assert coder.encode("xxx") == [3, 3, 3]
    coder = load(word_level(unknown=None), tmp_path)
    assert len(coder.encode("the cat")) == 2
    with pytest.raises(Unencodable, match="the text spells '</s>', the end of a text"):
        coder.encode("the </s>")


@pytest.mark.parametrize(
    ("made", "text", "unknown"),
    [
        (bpe(), "ab é漢é c\n", 3),  # left out, but not the blanks
        (bpe(), "abc", 0),
        (byte_bpe(), "ab é漢é", 0),
        (unigram(), "ab é漢é a é", 2),  # those in a row are one
        (word_level(), "the cat sat", 1),
        (bpe(unknown="<unk>"), "ab é漢", 2),
    ],
    ids=["bpe", "bpe of ASCII", "byte_bpe", "unigram", "word_level", "bpe with an unknown token"],
)
def test_what_has_no_token_is_counted(tmp_path, made, text, unknown):
    assert load(made, tmp_path).encode_and_count(text)[1] == unknown


def test_what_has_no_token_does_not_end_the_text(tmp_path):
    """As of a BPE whose unknown token is its end."""
    coder = load(bpe(unknown="</s>"), tmp_path)
    ids, unknown = coder.encode_and_count("aéb</s>")
    assert coder.end_of_text not in ids and unknown == 1
    assert coder.decode(ids) == "ab</s>"


@pytest.mark.parametrize(
    "made",
    [word_level(unknown=None), unigram(unknown=None), bpe(unknown="<none>")],
    ids=lambda made: str(made.model)[:9],
)
def test_a_model_without_its_unknown_token_says_so(tmp_path, made):
    coder = load(made, tmp_path)
    with pytest.raises(Unencodable, match=r"(?i)unk") as error:
        coder.encode("the cat é")
    assert "\n" not in str(error.value)


def test_special_tokens_of_one_character_stay(tmp_path):
    """There is nothing to spell them with."""
    coder = load(bpe(characters=(*LETTERS, "\n")), tmp_path, special=[*SPECIAL, "\n"])
    ids, unknown = coder.encode_and_count("a\nb")
    assert len(ids) == 3 and not unknown and isinstance(coder, JsonTokenizer)
