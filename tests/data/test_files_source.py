import bz2
import contextlib
import gzip
import json
import lzma

import pyarrow
import pytest

from maxsep.config import ConfigError
from maxsep.data import files
from maxsep.data.files_source import FilesSource, place

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


def find(tmp_path, pattern="*"):
    return FilesSource(str(tmp_path / pattern), tmp_path / "cache")


def documents(source, parts):
    """The documents of the parts, read part by part."""
    found, text = [], ""
    for part in parts:
        for piece, ends, _ in source.read(part):
            text += piece
            if ends:
                found.append(text)
                text = ""
    return found + [text] * bool(text)


def read(source, train=None, held_out=None):
    return [documents(source, parts) for parts in source.splits(train, held_out)]


@pytest.mark.parametrize("ending", COMPRESS)
def test_every_document_is_on_one_side(tmp_path, ending):
    texts = [f"document {i}, ".encode() * (i % 7 + 1) for i in range(300)]
    texts = [text.decode() for text in texts]
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](jsonl(texts[:200])))
    (tmp_path / f"b.jsonl{ending}").write_bytes(COMPRESS[ending](jsonl(texts[200:])))
    source = find(tmp_path, "*.jsonl*")
    train, held_out = read(source)
    assert sorted(train + held_out) == sorted(texts)
    assert 28 <= len(held_out) <= 32
    assert [text for text in texts if text in set(train)] == train
    train_parts, _ = source.splits(None, None)
    assert len(train_parts) == 2 if ending else len(train_parts) > 4


@pytest.mark.parametrize("ending", COMPRESS)
def test_texts_are_cut_like_one_long_text(tmp_path, ending):
    book = "".join(f"line {i} of the book\n\n  indented ä€😀\n" for i in range(400))
    (tmp_path / f"b.txt{ending}").write_bytes(COMPRESS[ending](book.encode()))
    (tmp_path / f"a.txt{ending}").write_bytes(COMPRESS[ending](b"a short one"))
    train, held_out = read(find(tmp_path, "*.txt*"))
    assert train[0] == "a short one" and len(train) == 2 and len(held_out) == 1
    assert train[1] + held_out[0] == book
    assert train[1].endswith("\n")
    share = len(held_out[0].encode()) / len(book.encode())
    assert 0.09 < share < 0.11


def test_a_text_without_lines_is_cut_between_characters(tmp_path):
    book = "€" * 1000
    (tmp_path / "a.txt").write_text(book)
    (train,), (held_out,) = read(find(tmp_path, "*.txt"))
    assert train + held_out == book and 90 <= len(held_out) <= 101


def test_two_documents_make_two_splits(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["held out", "trained on"]))
    assert read(find(tmp_path, "*.jsonl")) == [["trained on"], ["held out"]]


def test_places_are_even_and_stay():
    for count in (10, 100, 1000):
        held_out = sum(place(0, line) >= 0.9 for line in range(count))
        assert abs(held_out - count / 10) <= 2


def test_slices_of_the_config(tmp_path):
    texts = [str(i) for i in range(100)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    source = find(tmp_path, "*.jsonl")
    train, held_out = read(source, None, "train[20%:30%]")
    assert sorted(train + held_out) == sorted(texts)
    train, held_out = read(source, "train[:50%]", "train[50%:75%]")
    assert 48 <= len(train) <= 52 and 23 <= len(held_out) <= 27 and not set(train) & set(held_out)


@pytest.mark.parametrize(
    "held_out",
    [
        "train[90%:100%]",
        "train[0%:10%]",
        "train[:10%]+train[90%:]",
        "train[90%:]+train[:10%]",
        "train[10%:20%] + train[15%:30%]",
        "train[20%:30%]+train[30%:40%]",
        "train[:99%]",
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_the_rest_of_any_slices_is_trained_on(tmp_path, held_out, kind):
    lines = [f"{i:03}" for i in range(200)]
    content = jsonl(lines) if kind == "jsonl" else "\n".join(lines).encode()
    (tmp_path / f"a.{kind}").write_bytes(content)
    sides = read(find(tmp_path, "a.*"), None, held_out)
    found = [line for side in sides for text in side for line in text.split()]
    assert sorted(found) == lines and all(sides)


def test_nothing_is_left_of_all(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a", "b"]))
    for held_out in ("train", "train[:]", "train[:40%]+train[30%:]"):
        with pytest.raises(ConfigError, match=r"^data\.eval_split: got train.*, which leaves nothing to train on"):
            find(tmp_path, "*.jsonl").check_splits(None, held_out)


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_what_slices_share_is_read_once(tmp_path, kind):
    lines = [f"{i:03}" for i in range(200)]
    (tmp_path / f"a.{kind}").write_bytes(jsonl(lines) if kind == "jsonl" else "\n".join(lines).encode())
    train, _ = read(find(tmp_path, "a.*"), "train[10%:40%]+train[:20%]", "train[90%:]")
    found = [line for text in train for line in text.split()]
    assert 78 <= len(found) == len(set(found)) <= 82


@pytest.mark.parametrize(
    "train, held_out, field",
    [
        ("train", None, "data.split"),
        ("train[:50%]", "train[40%:]", "data.split"),
        ("validation", None, "data.split"),
        ("train[:10]", None, "data.split"),
        (None, "test", "data.eval_split"),
        (None, "train[90%:80%]", "data.eval_split"),
        (None, "train[90%", "data.eval_split"),
    ],
)
def test_wrong_splits_are_refused(tmp_path, train, held_out, field):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a", "b"]))
    with pytest.raises(ConfigError, match=rf"^{field}: got "):
        find(tmp_path, "*.jsonl").splits(train, held_out)


def test_odd_lines_and_marks_are_no_text(tmp_path):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "half \\ud800 pair"}\n{"text": ""}\n{"text": "no newline"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    train, held_out = read(find(tmp_path, "*.jsonl"))
    assert sorted(train + held_out) == ["", "a", "half ? pair", "no newline"]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfmarked\r\nat its start")
    assert "".join(read(find(tmp_path, "b.txt"), "train[:50%]", "train[50%:]")[0]).startswith("marked")


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
    hashes = [FilesSource(str(f / "*.txt"), tmp_path).fingerprint(print) for f in (first, second)]
    assert hashes[0] == hashes[1]
    (second / "a.txt").write_text("not the same")
    assert FilesSource(str(second / "*.txt"), tmp_path).fingerprint(print) != hashes[0]


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


@pytest.mark.parametrize("pattern", ["nothing-*.jsonl", "*.csv", "folder", "*"])
def test_what_is_no_text_file_is_refused(tmp_path, pattern):
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"^data\.path: got .*takes a glob of .jsonl or .txt files"):
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
    path = tmp_path / "a.txt"
    path.write_text("line\n" * 1000)
    source = find(tmp_path, "a.txt")
    parts, _ = source.splits(None, None)
    path.write_text("line\n")
    with pytest.raises(ConfigError, match="changed while it was read"), contextlib.suppress(StopIteration):
        documents(source, parts)
