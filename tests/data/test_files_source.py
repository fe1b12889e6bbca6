import bz2
import gzip
import json
import lzma
import shutil

import pyarrow.parquet
import pytest
from corpora import ensure, read

from maxsep.config import ConfigError
from maxsep.data import files
from maxsep.data.files_source import FilesSource
from maxsep.data.text_files import TextFiles

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 256)
    monkeypatch.setattr(files, "PIECE", 512)


def jsonl(texts):
    return "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts).encode()


def find(tmp_path, pattern="*", column="text", name=None):
    return FilesSource(str(tmp_path / pattern), name, TextFiles(column), tmp_path / "cache")


def words(count):
    return [f"document {i}, " * (i % 7 + 1) for i in range(count)]


@pytest.mark.parametrize("ending", COMPRESS)
def test_every_document_is_on_one_side(tmp_path, ending):
    texts = words(300)
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](jsonl(texts[:200])))
    (tmp_path / f"b.jsonl{ending}").write_bytes(COMPRESS[ending](jsonl(texts[200:])))
    source = find(tmp_path, "*.jsonl*")
    train, held_out = read(source)
    assert sorted(train + held_out) == sorted(texts)
    assert 15 <= len(held_out) <= 45
    assert [text for text in texts if text in set(train)] == train
    assert len(list(source.parts("train"))) == 2 if ending else len(list(source.parts("train"))) > 4


BOOK = "".join(f"line {i} of the book\n\n  indented ä€😀\n" for i in range(4000))


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_book_has_sections_that_are_held_out(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 1 << 15)
    (tmp_path / f"b.txt{ending}").write_bytes(COMPRESS[ending](BOOK.encode()))
    train, held_out = read(find(tmp_path, "*.txt*"))
    place = {text: BOOK.index(text) for text in train + held_out}
    assert "".join(sorted(train + held_out, key=place.get)) == BOOK
    assert all(text.endswith("\n") for text in train + held_out)
    assert all(files.BLOCK < len(text.encode()) <= 8192 + 4096 for text in held_out)
    share = sum(map(len, held_out)) / len(BOOK)
    assert 0.05 < share < 0.15 and len(train) <= len(held_out) + 1


def test_sections_are_those_of_the_whole_file_wherever_it_is_cut(tmp_path, monkeypatch):
    for text in (BOOK, "€" * 9000, "x" * 8192, "x" * 8191 + "\n" + "y" * 20, "\n" * 30_000, "a\n" + "b" * 40_000):
        (tmp_path / "a.txt").write_text(text)
        found = []
        for piece in (1, 20_000, 1 << 20):
            monkeypatch.setattr(files, "PIECE", piece)
            (tmp_path / "cache" / "scans").exists() and shutil.rmtree(tmp_path / "cache")
            source = find(tmp_path, "a.txt")
            found.append([document for part in source.parts("train") for document in source.read(part)])
        assert found[0] == found[1] == found[2]
        assert "".join(document.content for document in found[0]) == text
        following = [document.following for document in found[0]]
        assert following == [document.place for document in found[0][1:]] + [None]


def test_two_documents_make_two_splits(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "other"]))
    corpus = ensure(tmp_path / "a.jsonl", tmp_path / "cache", sequence_length=2)
    assert (corpus.train.documents, corpus.eval.documents) == (1, 1)
    (tmp_path / "b.txt").write_text(BOOK[:20_000])
    corpus = ensure(tmp_path / "b.txt", tmp_path / "cache", sequence_length=2)
    assert corpus.eval.documents == 1 and corpus.eval.targets < corpus.train.targets


KINDS = ("jsonl", "txt", "parquet")


def write(folder, name, texts, kind):
    folder.mkdir(exist_ok=True)
    if kind == "txt":
        for i, text in enumerate(texts):
            (folder / f"{name}-{i:05}.txt").write_text(text)
    elif kind == "jsonl":
        (folder / f"{name}.jsonl").write_bytes(jsonl(texts))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{name}.parquet", row_group_size=7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_stays_on_its_side(tmp_path, kind):
    """Among other files, under another name, elsewhere in a file, and in a corpus that has grown past a limit."""
    texts = words(100)
    write(tmp_path / "one", "b", texts, kind)
    train, held_out = map(set, read(find(tmp_path, f"one/*.{kind}")))
    assert held_out
    write(tmp_path / "two", "a", [f"a neighbour {i}" for i in range(300)], kind)
    write(tmp_path / "two", "moved", texts[60:] + texts[:10], kind)
    write(tmp_path / "two", "rest", texts[10:60], "jsonl")
    for most, exactly in ((None, True), (500, False)):
        more = [set(side) for side in read(find(tmp_path, "two/*.*"), most=most)]
        assert not more[1] & train, "what was trained on would be evaluated on"
        assert (held_out <= more[1] and train <= more[0]) or not exactly
        assert len(more[0] | more[1]) == 400


def test_a_long_text_that_grows_keeps_its_sides(tmp_path):
    (tmp_path / "b.txt").write_text(BOOK[:-50_000])
    _, held_out = read(find(tmp_path, "b.txt"))
    (tmp_path / "a.txt").write_text("a neighbour")
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_text(BOOK)
    _, more = read(find(tmp_path, "*.txt"))
    assert set(held_out[:-1]) < set(more)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_slice_is_trained_on(tmp_path, kind):
    texts = words(200)
    write(tmp_path, "a", texts, kind)
    for held_out in ("train[90%:]", "train[:10%]+train[90.5%:]", "train[10%:20%] + train[15%:30%]"):
        sides = read(find(tmp_path, f"*.{kind}"), None, held_out)
        assert sorted(sides[0] + sides[1]) == sorted(texts) and all(sides)


def test_odd_lines_and_marks_are_no_text(tmp_path):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "half \\ud800 pair"}\n{"text": ""}\n{"text": "no newline"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    train, held_out = read(find(tmp_path, "*.jsonl"))
    assert sorted(train + held_out) == ["a", "half ? pair", "no newline"]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfmarked\r\nat its start")
    (train, held_out) = read(find(tmp_path, "b.txt"))
    assert train + held_out == ["marked\r\nat its start"]


@pytest.mark.parametrize("blank", [b"", b"\n", b"\r\n", b" \t\n\n"])
def test_a_mark_and_blanks_are_no_line(tmp_path, blank):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + blank)
    assert read(find(tmp_path, "a.jsonl")) == [[], []]
    (tmp_path / "a.jsonl").write_bytes((b"\xef\xbb\xbf" + blank + jsonl(["x"])) * 2)  # as of two files in a row
    assert sum(map(len, read(find(tmp_path, "a.jsonl")))) == 2


def test_files_with_the_same_text_are_told(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x", "y"]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(["x", "y"])))
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"")
    log = []
    find(tmp_path, "[ab].*").prepare(log.append)
    assert len(log) == 1 and log[0].startswith("WARNING: data.path: ")
    assert "b.jsonl.gz' has the same text as " in log[0] and "a.jsonl'" in log[0]
    log.clear()
    find(tmp_path, "a.*").prepare(log.append)
    assert not log


def test_the_hash_is_of_the_contents(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "a.txt").write_text("the same")
    hashes = [find(folder, "*.txt").fingerprint(print) for folder in (first, second)]
    assert hashes[0] == hashes[1]
    assert find(second, "*.txt", column="other").fingerprint(print) != hashes[0]
    (second / "a.txt").write_text("not the same")
    assert find(second, "*.txt").fingerprint(print) != hashes[0]


def test_a_file_is_read_for_its_hash_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text")
    source = find(tmp_path, "*.txt")
    assert not source.quick_fingerprint()
    first = source.fingerprint(print)
    monkeypatch.setattr(files, "scan", None)
    assert source.quick_fingerprint() and find(tmp_path, "*.txt").fingerprint(print) == first


def damaged(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    source = find(tmp_path, name)
    with pytest.raises(ConfigError, match=r"^data\.path: .*" + name) as error:
        read(source, "train[:99%]", "train[99%:]")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("ending", list(COMPRESS)[1:])
@pytest.mark.parametrize("how", ["cut", "not compressed"])
def test_a_damaged_compressed_file_is_named(tmp_path, ending, how):
    whole = COMPRESS[ending](jsonl([f"{i * 7919}" for i in range(1000)]))
    content = whole[: len(whole) // 2] if how == "cut" else b"plain text, not compressed " * 10
    assert "cannot be read to its end" in damaged(tmp_path, f"a.jsonl{ending}", content)


@pytest.mark.parametrize(
    "line, what",
    [
        (b'{"txt": "a"}', 'no string under the key "text"'),
        (b'{"text": 1}', 'no string under the key "text"'),
        (b'["text"]', 'no string under the key "text"'),
        (b'{"text": "a"', "is not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\xed\xa0\xbd\xed\xb8\x80"}', "is not UTF-8"),  # halves of a surrogate pair, each encoded
        ('{"text": "a"}'.encode("utf-16"), "is not UTF-8"),
        ('{"text": "a"}'.encode("utf-16-be"), "is not UTF-8"),
        ('{"text": "a"}'.encode("utf-32-le"), "is not UTF-8"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, what):
    message = damaged(tmp_path, "a.jsonl", jsonl(["x" * 40] * 30) + line + b"\n" + jsonl(["y"]))
    assert ":31 " in message and what in message


def test_text_that_is_not_utf8_is_named(tmp_path):
    assert "not UTF-8" in damaged(tmp_path, "a.txt", b"fine\n" * 300 + b"caf\xe9 au lait\n" + b"fine\n" * 9)


@pytest.mark.parametrize("pattern", ["nothing-*.jsonl", "*.csv", "*"])
def test_what_is_no_text_file_is_refused(tmp_path, pattern):
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"^data\.path: got .*takes a glob of .parquet, .jsonl or .txt files"):
        find(tmp_path, pattern)


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(ConfigError, match=r"^data\.path: .*a\.jsonl' cannot be read \(No such file or directory\); "):
        find(tmp_path, "*.jsonl")


def test_a_file_that_is_gone_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a", "b"]))
    source = find(tmp_path, "*.jsonl")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"^data\.path: .*a\.jsonl' cannot be read"):
        source.fingerprint(print)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(words(100)))
    source = find(tmp_path, "a.jsonl")
    parts = list(source.parts("train"))
    path.write_text(path.read_text()[:900])
    with pytest.raises(ConfigError, match="changed while it was read"):
        list(source.read(parts[1]))
