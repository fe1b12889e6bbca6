"""Parquet files: the same documents as .jsonl, whatever their form; what is damaged or has no text is named."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from corpora import ensure, read, run

from maxsep.config import ConfigError
from maxsep.data import files, parquet
from maxsep.data.files_source import FilesSource
from maxsep.data.text_files import TextFiles

TEXTS = [f"document {i}, ä€😀 " * (i % 9 + 1) for i in range(120)]
TYPES = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


def table(texts, kind="string", column="text"):
    texts = pyarrow.array(texts)
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(TYPES[kind])
    return pyarrow.table({"id": list(range(len(texts))), column: texts, "url": ["x"] * len(texts)})


def find(tmp_path, pattern="*.parquet", column="text"):
    return FilesSource(str(tmp_path / pattern), None, TextFiles(column), tmp_path / "cache")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("compression, rows", [("zstd", 7), ("snappy", 1000), ("none", 50)])
def test_the_documents_are_those_of_the_table(tmp_path, kind, compression, rows, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 500)
    monkeypatch.setattr(parquet, "ROWS", 5)
    for name, texts in (("a", TEXTS[:70]), ("b", TEXTS[70:])):
        made = table(texts, kind, "content")
        pyarrow.parquet.write_table(made, tmp_path / f"{name}.parquet", compression=compression, row_group_size=rows)
    source = find(tmp_path, column="content")
    train, held_out = read(source)
    assert sorted(train + held_out) == sorted(TEXTS)
    assert [text for text in TEXTS if text in set(train)] == train
    groups = len(list(source.parts("train")))
    assert groups == 2 if rows == 1000 else groups > 2


def test_workers_make_the_same_records_as_of_jsonl(tmp_path, small_units):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=7)
    lines = pyarrow.table({"text": TEXTS}).to_pylist()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(tmp_path / "a.parquet", tmp_path / "cache", "--workers=2") == 0
    corpora = [ensure(tmp_path / f"a.{kind}", tmp_path / "cache", []) for kind in ("parquet", "jsonl")]
    assert corpora[0].fingerprint == corpora[1].fingerprint


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Of Arrow and of Python together, for a row group sixteen times as large."""
    peaks = []
    for rows in (1000, 16_000):
        path = tmp_path / f"{rows}.parquet"
        made = pyarrow.table({"text": [f"{i * 7919 % 104729:06} " * 1000 for i in range(rows)]})
        pyarrow.parquet.write_table(made, path, use_dictionary=False, compression="snappy")
        del made
        before = pyarrow.total_allocated_bytes()
        peak = 0
        for document in parquet.read(str(path), 0, 1, "text"):
            peak = max(peak, pyarrow.total_allocated_bytes() - before)
            assert len(document.content) == 7000
        peaks.append(peak)
    assert peaks[1] < 1.5 * peaks[0]


def nested():
    return pyarrow.table({"text": [{"text": "a"}, {"text": "b"}]})


NOT_TEXT = {
    "a missing column": (table(TEXTS, column="txt"), "has no column 'text'; takes .*of id, txt, url"),
    "no column": (pyarrow.table({}), "has no column 'text'"),
    "nested": (nested(), r"the column 'text' is struct<.*; takes one of strings"),
    "a list": (pyarrow.table({"text": [["a"], ["b"]], "c": ["x", "y"]}), "is list<.*takes one of strings .*as c$"),
    "numbers": (pyarrow.table({"text": [1, 2]}), "the column 'text' is int64"),
    "bytes": (pyarrow.table({"text": [b"a", b"b"]}), "the column 'text' is binary"),
    "a null": (pyarrow.table({"text": [*TEXTS, None, "b"]}), ", row 121 has null in the column 'text'"),
    "nulls": (pyarrow.table({"text": [None, None]}), "the column 'text' is null"),
    "no row": (pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), "holds no text"),
    "empty texts": (pyarrow.table({"text": ["", ""]}), "holds no text"),
}


@pytest.mark.parametrize("what", NOT_TEXT)
def test_what_is_no_text_is_refused(tmp_path, what):
    made, message = NOT_TEXT[what]
    pyarrow.parquet.write_table(made, tmp_path / "a.parquet")
    refused(tmp_path, message)


def refused(tmp_path, message):
    with pytest.raises(ConfigError, match=rf"^data\.path: .*a\.parquet.*{message}") as error:
        ensure(tmp_path / "a.parquet", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/records/*.partial"))


@pytest.mark.parametrize("how", ["empty", "cut", "no magic", "json", "garbled", "not UTF-8"])
def test_a_damaged_file_is_named(tmp_path, how):
    path = tmp_path / "a.parquet"
    text = pyarrow.array(TEXTS)
    if how == "not UTF-8":
        text = pyarrow.array([text.encode() + b"\xff" for text in TEXTS]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path, compression="zstd")
    content = path.read_bytes()
    middle = len(content) // 3
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[:-100],
            "no magic": b"PAR2" + content[4:-4] + b"PAR2",
            "json": b'{"text": "a"}\n' * 20,
            "garbled": content[:middle] + bytes(64) + content[middle + 64 :],
            "not UTF-8": content,
        }[how]
    )
    refused(tmp_path, "not UTF-8" if how == "not UTF-8" else "cannot be read as parquet: ")
