"""Packing, and the records on disk."""

import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import snapshot

from maxsep.config import Config, ConfigError, DataConfig, ModelConfig, cli, faults
from maxsep.data import files, packing, preparation, records, token_parts
from maxsep.data.records import Corpus, Damaged
from maxsep.data.splits import place

END = "<|endoftext|>"


def config(folder, texts=None, **data):
    """A config of a .jsonl file in the folder, with bytes as tokens."""
    if texts is not None:
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    defaults = {"source": "files", "path": str(folder / "*.jsonl"), "sequence_length": 8, "tokenizer": "bytes"}
    return Config(
        data=DataConfig(**defaults | {"cache": str(folder / "cache")} | data), model=ModelConfig(vocab_size=300)
    )


def ensure(folder, texts=None, **data):
    return preparation.ensure(config(folder, texts, **data), lambda line: None).corpora["files"]


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Pieces, shards and what is written at once are so small that a test has many of them."""
    monkeypatch.setattr(files, "BLOCK", 64)
    monkeypatch.setattr(files, "PIECE", 128)
    monkeypatch.setattr(packing, "SHARD_TOKENS", 64)
    monkeypatch.setattr(token_parts, "WRITE_TOKENS", 16)
    monkeypatch.setattr(token_parts, "PIECE", 50)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    texts = [f"text {i} " * (i % 5 + 1) for i in range(60)]
    return ensure(tmp_path_factory.mktemp("corpus"), texts)


def stream(split):
    """All tokens of a split, from its records: the first, and every target."""
    rows = np.stack([split[i] for i in range(len(split))])
    targets = rows[:, 1:]
    assert (targets >= 0).sum() == split.targets
    assert (targets[:-1] >= 0).all(), "only the last record is padded"
    assert (rows[1:, 0] == rows[:-1, -1]).all(), "neighbours share a token"
    return [int(rows[0, 0]), *targets[targets >= 0].tolist()]


@given(texts=st.lists(st.text(max_size=60), min_size=30, max_size=60), length=st.integers(1, 50))
def test_nothing_is_lost(texts, length):
    texts = [f"{text}.{i}" for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        corpus = ensure(Path(folder), texts, sequence_length=length)
        places = {text: place(text.encode()) for text in texts}
        limit = 0.9 if max(places.values()) >= 0.9 else max(places.values())
        held_out = sorted((text for text in texts if places[text] >= limit), key=places.get, reverse=True)
        trained_on = [text for text in texts if places[text] < limit]
        for split, documents in ((corpus.train, trained_on), (corpus.eval, held_out)):
            assert corpus.tokenizer.decode(stream(split)) == "".join(text + END for text in documents)
            assert split.documents == len(documents)
            assert len(split) == math.ceil(split.targets / length)


def test_the_unigram_entropy_is_that_of_the_counts(tmp_path):
    corpus = ensure(tmp_path, ["abcabcabd", "abcabcaba" * 3, "aabb"])
    train, held_out = stream(corpus.train)[1:], stream(corpus.eval)[1:]
    size = corpus.tokenizer.vocab_size
    expected = -np.mean([math.log((train.count(t) + 1) / (len(train) + size)) for t in held_out])
    assert corpus.unigram_entropy == pytest.approx(expected, rel=1e-12)


def test_limits_are_exact(tmp_path):
    texts = [f"{i:030}" for i in range(40)]
    whole = ensure(tmp_path, texts, eval_split="train[80%:]")
    limited = ensure(tmp_path, eval_split="train[80%:]", max_tokens=200)
    assert stream(limited.train) == stream(whole.train)[:200] and limited.train.documents == 7
    assert limited.fingerprint != whole.fingerprint
    limited = ensure(tmp_path, eval_split="train[80%:]", eval_max_tokens=33)
    assert stream(limited.eval) == stream(whole.eval)[:33] and limited.eval.documents == 2
    assert stream(limited.train) == stream(whole.train), "a slice that is named is not trained on"


@pytest.mark.parametrize("name", ["gpt2", "gpt2:300"])
def test_ids_of_any_size_are_kept(tmp_path, name, monkeypatch):
    monkeypatch.setattr(packing, "id_dtype", lambda size: np.dtype(np.uint32))
    monkeypatch.setattr(records, "id_dtype", lambda size: np.dtype(np.uint32))
    made = config(tmp_path, [f"{i} hello world, said the tokenizer" for i in range(9)], tokenizer=name)
    corpus = preparation.ensure(Config(data=made.data, model=ModelConfig(vocab_size=50257)), print).corpora["files"]
    assert corpus.tokenizer.decode(stream(corpus.eval)).endswith(" hello world, said the tokenizer" + END)


def damage(corpus, how):
    shard = corpus.folder / "train-00001.array_record"
    if how == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "missing":
        shard.unlink()
    elif how == "zeros":
        shard.write_bytes(bytes(shard.stat().st_size))
    else:
        manifest = corpus.folder / "manifest.json"
        content = manifest.read_text()
        manifest.write_text(content.replace('"documents": ', '"documents": 1') if how == "changed" else content[:99])


@pytest.mark.parametrize("how", ["cut", "missing", "zeros", "changed", "half a manifest"])
def test_a_damaged_corpus_is_never_silently_shorter(tmp_path, how):
    corpus = ensure(tmp_path, [f"text {i} " * 3 for i in range(50)])
    whole = stream(corpus.train)
    damage(corpus, how)
    with pytest.raises(Damaged, match="is damaged"):
        Corpus(corpus.folder, corpus.tokenizer, corpus.source)
    log = []
    again = preparation.ensure(config(tmp_path), log.append).corpora["files"]
    assert stream(again.train) == whole and again.fingerprint == corpus.fingerprint
    assert "is damaged" in log[0]


def test_a_flipped_bit_is_noticed_or_harmless(tmp_path):
    corpus = ensure(tmp_path, [f"text {i} " * 3 for i in range(50)])
    whole = stream(corpus.train)
    shard = corpus.folder / "train-00000.array_record"
    content = shard.read_bytes()
    noticed = 0
    for byte in [i for i, value in enumerate(content) if value][::17]:
        shard.write_bytes(content[:byte] + bytes([content[byte] ^ 4]) + content[byte + 1 :])
        try:
            assert stream(Corpus(corpus.folder, corpus.tokenizer, corpus.source).train) == whole
        except Damaged as error:
            assert "train-00000.array_record" in str(error)
            noticed += 1
    assert noticed


class Faulty:
    """Shards whose first `times` reads fail; `faulty.error` is what array_record raises then."""

    def __init__(self, monkeypatch, error: str, times: float):
        self.error, self.left, self.open = error, times, records.open_shard
        monkeypatch.setattr(records, "open_shard", self.opened)

    def opened(self, path):
        reader = self.open(path)

        def read(indices):
            self.fail()
            return reader.read(indices)

        def num_records():
            self.fail()
            return reader.num_records()

        return SimpleNamespace(read=read, num_records=num_records)

    def fail(self):
        if self.left > 0:
            self.left -= 1
            raise RuntimeError(self.error)


GONE = "read() failed: Input/output error; reading a.array_record; at byte 0; Could not read"


def test_a_record_that_cannot_be_read_is_waited_for(corpus, monkeypatch):
    whole = stream(corpus.train)
    monkeypatch.setattr(faults, "RETRY_SECONDS", 60.0)
    monkeypatch.setattr(faults, "PAUSES", (0.0, 0.0))
    faulty = Faulty(monkeypatch, GONE, 3)
    again = Corpus(corpus.folder, corpus.tokenizer, corpus.source)
    assert faulty.left == 0
    faulty.left = 3
    assert stream(again.train) == whole and faulty.left == 0


@pytest.mark.parametrize(
    "error, status",
    [
        (GONE, cli.RESTART),
        (GONE.replace("Input/output error", "Stale file handle"), cli.RESTART),
        ("open() failed: No such file or directory; opening a.array_record", cli.RESTART),  # prepared anew
        ("open() failed: Permission denied; opening a.array_record", cli.USER_ERROR),
        ("Corrupted Riegeli/records file: chunk header hash mismatch", cli.USER_ERROR),
    ],
)
def test_a_record_that_cannot_be_read_ends_the_run(tmp_path, monkeypatch, error, status):
    faulty = Faulty(monkeypatch, error, 0)
    corpus = ensure(tmp_path, [f"text {i}" for i in range(20)])
    before = snapshot(corpus.folder)
    faulty.left = math.inf
    with pytest.raises((cli.Exit, ConfigError)) as caught:
        corpus.train[0]
    found, line = cli.outcome(caught.value)
    assert found == status and line.startswith(f"data.cache: {corpus.folder}/train-00000.array_record ")
    if "Corrupted" in error or "No such" in error:
        return  # at the start this is damage, and the corpus is prepared anew: above
    with pytest.raises(ConfigError) as caught:
        ensure(tmp_path)
    assert cli.outcome(caught.value)[0] == status
    assert snapshot(corpus.folder) == before, "what cannot be read is not removed"
