"""Files of ids that other trainers wrote: the same documents as the text that they were made from."""

import json
import re
import struct

import numpy as np
import pytest
from corpora import ensure, read, run

from maxsep.config import ConfigError
from maxsep.data import files, token_files
from maxsep.data.files_source import FilesSource
from maxsep.data.token_files import TokenFiles

END = 256
TEXTS = [f"document {i}, ä€😀 " * (i % 9 + 1) for i in range(120)]
DOCUMENTS = [[*text.encode(), END] for text in TEXTS]


def stream(documents):
    return np.concatenate(documents) if documents else np.zeros(0, np.int64)


def nanogpt(folder, documents, dtype="<u2"):
    (folder / "a.bin").write_bytes(stream(documents).astype(dtype).tobytes())


def llm_c(folder, documents):
    """Which has the end of a text before each."""
    ids = stream([[END, *document[:-1]] for document in documents]).astype("<u2")
    (folder / "a.bin").write_bytes(np.array([20240520, 1, len(ids), *[0] * 253], "<i4").tobytes() + ids.tobytes())


def llama(folder, documents):
    ids = stream(documents).astype("<u4")
    (folder / "a.bin").write_bytes(np.array([20240801, 7, len(ids), *[0] * 253], "<i4").tobytes() + ids.tobytes())


def npy(folder, documents, dtype="<i4"):
    np.save(folder / "a.npy", stream(documents).astype(dtype))


def megatron(folder, documents, dtype="<i4", sentences=False, ends=True, name="a"):
    """As its documentation says: an index of sequences and documents beside the ids."""
    if not ends:
        documents = [document[:-1] for document in documents]
    sequences, first = [], [0]
    for document in documents:
        half = len(document) // 2
        sequences += [document[:half], document[half:]] if sentences else [document]
        first.append(len(sequences))
    code = {"<i4": 4, "<u2": 8, "<i8": 5}[dtype]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    places = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(first))
    content = head + lengths.tobytes() + places.astype("<i8").tobytes() + np.array(first, "<i8").tobytes()
    (folder / f"{name}.idx").write_bytes(content)
    (folder / f"{name}.bin").write_bytes(stream(sequences).astype(dtype).tobytes())


WRITERS = {
    "nanoGPT": nanogpt,
    "llm.c": llm_c,
    "Llama 3 in llm.c": llama,
    "npy": npy,
    "npy, 8 bytes": lambda folder, documents: npy(folder, documents, ">i8"),
    "Megatron": megatron,
    "Megatron, 2 bytes": lambda folder, documents: megatron(folder, documents, "<u2"),
    "Megatron, sentences": lambda folder, documents: megatron(folder, documents, sentences=True),
    "Megatron, without ends": lambda folder, documents: megatron(folder, documents, ends=False),
}


def find(tmp_path, size=257):
    return FilesSource(str(tmp_path / "a.*"), None, TokenFiles("bytes", size, END), tmp_path / "cache")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("piece", [50, 1 << 20])
def test_the_documents_are_those_that_were_written(tmp_path, writer, piece, monkeypatch):
    monkeypatch.setattr(files, "PIECE", piece)
    monkeypatch.setattr(token_files, "BLOCK", 37)
    WRITERS[writer](tmp_path, DOCUMENTS)
    source = find(tmp_path)
    sides = read(source)
    assert sorted(bytes(ids.tolist()).decode() for side in sides for ids in side) == sorted(TEXTS)
    trained = [bytes(ids.tolist()).decode() for ids in sides[0]]
    assert trained == [text for text in TEXTS if text in set(trained)] and sides[1]
    assert len(list(source.parts("train"))) > 20 if piece == 50 else len(list(source.parts("train"))) == 1


def test_the_tokens_are_those_of_the_text(tmp_path, small_units):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    whole = ensure(tmp_path / "a.jsonl", tmp_path / "cache")
    found = []
    for writer in WRITERS:
        folder = tmp_path / writer.replace(" ", "")
        folder.mkdir()
        WRITERS[writer](folder, DOCUMENTS)
        if not found:
            assert run(folder, tmp_path / "cache", "--config.data.source=tokens", "--workers=2") == 0
        found.append(ensure(folder, tmp_path / "cache", source="tokens"))
    assert {corpus.fingerprint for corpus in found} == {found[0].fingerprint}
    for corpus in (whole, found[0]):
        assert corpus.train.targets + corpus.eval.targets + 2 == sum(map(len, DOCUMENTS))
        assert corpus.train.documents + corpus.eval.documents == len(DOCUMENTS)


def test_a_folder_has_splits(tmp_path):
    for name, documents in (("train", DOCUMENTS), ("val", DOCUMENTS[:7])):
        nanogpt(tmp_path, documents)
        (tmp_path / "a.bin").rename(tmp_path / f"{name}.bin")
    corpus = ensure(tmp_path, tmp_path / "cache", source="tokens")
    assert (corpus.train.documents, corpus.eval.documents) == (120, 7)


def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


def changed(path, offset, content):
    path.write_bytes(path.read_bytes()[:offset] + content + path.read_bytes()[offset + len(content) :])


def of_another(folder):
    megatron(folder, DOCUMENTS[:50])
    index = (folder / "a.idx").read_bytes()
    megatron(folder, DOCUMENTS)
    (folder / "a.idx").write_bytes(index)


FOREIGN = {
    "an id past the vocabulary": (
        lambda f: npy(f, [*DOCUMENTS, [7, 257, END]]),
        "has the id 257, .*takes ids below",
    ),
    "a negative id": (lambda f: npy(f, [*DOCUMENTS, [-1, END]]), "has the id -1"),
    "no whole ids": (lambda f: (nanogpt(f, DOCUMENTS), cut(f / "a.bin", 101)), "has 101 bytes; takes whole ids of 2"),
    "ids of 4 bytes": (lambda f: nanogpt(f, DOCUMENTS, "<u4"), "it has ids of 4 bytes"),
    "a header that lies": (lambda f: (llm_c(f, DOCUMENTS), cut(f / "a.bin", 2048)), "ids by its header, and 512 by"),
    "floats": (lambda f: np.save(f / "a.npy", np.ones(9)), r"is float64\[9\]; takes an array of integers"),
    "a table": (lambda f: np.save(f / "a.npy", np.ones((2, 9), int)), r"is int64\[2, 9\]; takes an array of integers"),
    "objects": (lambda f: np.save(f / "a.npy", np.array([{}])), "cannot be read: "),
    "an archive": (lambda f: np.savez(f / "a.npz", np.ones(9)), "matches"),
    "not numpy's": (lambda f: (f / "a.npy").write_bytes(b"text"), "cannot be read: "),
    "a cut array": (lambda f: (npy(f, DOCUMENTS), cut(f / "a.npy", 999)), "cannot be read: "),
    "nothing in an array": (lambda f: npy(f, []), "holds no text"),
    "nothing": (lambda f: (f / "a.bin").write_bytes(b""), "holds no text"),
    "ends alone": (lambda f: nanogpt(f, [[END]] * 9), "holds no text"),
    "an index of another": (of_another, "a.idx' does not fit "),
    "an old index": (lambda f: (megatron(f, DOCUMENTS), changed(f / "a.idx", 0, b"TNTIDX")), "is not an index of Meg"),
    "a cut index": (lambda f: (megatron(f, DOCUMENTS), cut(f / "a.idx", 999)), "has 999 bytes, not "),
    "an empty index": (lambda f: (megatron(f, DOCUMENTS), cut(f / "a.idx", 0)), "is not an index of Meg"),
    "an index of floats": (lambda f: (megatron(f, DOCUMENTS), changed(f / "a.idx", 17, b"\7")), "version 1, type 7"),
    "a cut .bin": (lambda f: (megatron(f, DOCUMENTS), cut(f / "a.bin", 400)), "a.idx' does not fit "),
    "lengths that lie": (lambda f: (megatron(f, DOCUMENTS), changed(f / "a.idx", 34, b"\xff" * 4)), "does not fit "),
    "documents that lie": (
        lambda f: (megatron(f, DOCUMENTS), changed(f / "a.idx", 34 + 12 * 120, b"\x01")),
        "does not fit ",
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_or_damaged_file_is_one_line(tmp_path, what, capsys):
    make, message = FOREIGN[what]
    make(tmp_path)
    flags = "--config.data.source=tokens", "--workers=1"
    assert run(tmp_path / "a.*", tmp_path / "cache", *flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: data.path: ") and str(tmp_path / "a.") in line and re.search(message, line), line
    assert not list(tmp_path.glob("cache/records/*.partial"))


def test_an_index_that_changes_is_read_again(tmp_path):
    megatron(tmp_path, DOCUMENTS)
    first = find(tmp_path).fingerprint(print)
    assert find(tmp_path).quick_fingerprint()
    megatron(tmp_path, DOCUMENTS, sentences=True)
    assert not find(tmp_path).quick_fingerprint() and find(tmp_path).fingerprint(print) != first


@pytest.mark.parametrize("name", ["gpt2", "ids:65537:2"])
def test_ids_of_two_and_of_four_bytes(tmp_path, name):
    """By the number of the tokenizer's ids: uint16 holds 65,536."""
    size, end, dtype = (50257, 50256, "<u2") if name == "gpt2" else (65537, 2, "<u4")
    documents = [[i, size - 1 - (name == "gpt2"), end] for i in range(3, 90)]
    nanogpt(tmp_path, documents, dtype)
    corpus = ensure(tmp_path / "a.bin", tmp_path / "cache", source="tokens", tokenizer=name, vocab=size)
    assert corpus.train.documents + corpus.eval.documents == len(documents)
    nanogpt(tmp_path, documents, "<u2" if dtype == "<u4" else "<u4")
    with pytest.raises(ConfigError, match=r"^data\.path: .*a\.bin.* (takes whole ids of 4|it has ids of 4) bytes"):
        ensure(tmp_path / "a.bin", tmp_path / "cache", source="tokens", tokenizer=name, vocab=size)
