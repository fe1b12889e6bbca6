"""Folders as Hugging Face's hub lays them out: which files belong to which split."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from corpora import ensure

from maxsep.config import ConfigError
from maxsep.data import dataset_folder
from maxsep.data.text_files import TextFiles


def splits(folder, name):
    return dataset_folder.splits(folder, name, TextFiles.endings)


def put(folder, *names, readme=None):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if readme is not None:
        (folder / "README.md").write_text(readme)
    return folder


def found(folder, name=None):
    return {
        split: [path.removeprefix(f"{folder}/") for path in paths] for split, paths in splits(str(folder), name).items()
    }


FINEWEB = """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# FineWeb-Edu
"""
C4 = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: realnewslike
  data_files:
  - split: train
    path: realnewslike/c4-train.*.json.gz
---
"""


def test_the_parts_that_a_readme_names(tmp_path):
    web = put(tmp_path / "web", "data/A/train-00000-of-00002.parquet", "sample/10BT/000_00000.parquet", readme=FINEWEB)
    assert found(web) == {"train": ["data/A/train-00000-of-00002.parquet"]}
    assert found(web, "sample-10BT") == {"train": ["sample/10BT/000_00000.parquet"]}
    c4 = put(tmp_path / "c4", *(f"en/c4-{s}.0000{i}-of-01024.json.gz" for s in ("train", "validation") for i in "01"))
    put(c4, "realnewslike/c4-train.00000-of-00512.json.gz", readme=C4)
    assert {split: len(paths) for split, paths in found(c4, "en").items()} == {"train": 2, "validation": 2}
    with pytest.raises(ConfigError, match=r"^data\.name: got None; takes one .*: en, realnewslike$"):
        splits(str(c4), None)
    with pytest.raises(ConfigError, match=r"^data\.name: got 'de'; takes one .*: en, realnewslike$"):
        splits(str(c4), "de")


def test_a_default_and_a_folder_of_its_own(tmp_path):
    head = "configs: [{config_name: a, data_dir: x}, {config_name: b, default: true, data_files: 'y/*'}]"
    put(tmp_path, "x/train-0.parquet", "x/test-0.parquet", "y/test.parquet", "z.parquet", readme=f"---\n{head}\n---\n")
    assert found(tmp_path) == found(tmp_path, "b") == {"train": ["y/test.parquet"]}
    assert found(tmp_path, "a") == {"train": ["x/train-0.parquet"], "test": ["x/test-0.parquet"]}


def test_a_part_that_was_not_downloaded_is_told(tmp_path):
    web = put(tmp_path, "sample/10BT/000_00000.parquet", readme=FINEWEB)
    told = r"^data\.name: got None, whose files data/\*/\* are not there; takes .*: sample-10BT$"
    with pytest.raises(ConfigError, match=told):
        splits(str(web), None)


@pytest.mark.parametrize(
    "names, expected",
    [
        (["data/train-0.parquet", "data/validation-0.parquet"], {"train": 1, "validation": 1}),
        (["train.jsonl", "dev.jsonl", "test.jsonl"], {"train": 1, "validation": 1, "test": 1}),
        (["val/a.txt", "train/a.txt", "train/b.txt"], {"train": 2, "validation": 1}),
        (["a.parquet", "b.parquet", "README.txt", "dataset_infos.json"], {"train": 2}),
        (["c4-train.0.json.gz", "dataset_infos.json"], {"train": 1}),
        (["a.json"], {"train": 1}),
        (["trainers.jsonl", "evaluated.jsonl"], {"train": 2}),
        ([".cache/x.jsonl", "a.jsonl.zst", "notes.txt"], {"train": 1}),
    ],
)
@pytest.mark.parametrize("readme", [None, "# a page without a head\n", "---\nlicense: mit\n---\n", "---\n---\n"])
def test_splits_go_by_names(tmp_path, names, expected, readme):
    folder = put(tmp_path, *names, readme=readme)
    assert {split: len(paths) for split, paths in found(folder).items()} == expected


HEADS = [
    "configs: [{data_files: x}]",
    "configs: x",
    "configs: [{config_name: a, data_files: [{path: x}]}]",
    "a: [b",
    "- a",
]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_is_none_of_a_dataset_is_named(tmp_path, head):
    put(tmp_path, "a.jsonl", readme=f"---\n{head}\n---\n")
    with pytest.raises(ConfigError, match=r"^data\.path: the head of '.*README\.md' is not a dataset's: ") as error:
        splits(str(tmp_path), None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [[], ["data-00000-of-00001.arrow", "state.arrow"], ["a.csv"]])
def test_a_folder_without_text_is_refused(tmp_path, names):
    with pytest.raises(ConfigError, match=r"^data\.path: got '.*', a folder without any; takes one with .parquet"):
        splits(str(put(tmp_path, *names)), None)
    with pytest.raises(ConfigError, match=r"^data\.name: got 'en'; takes None, as '.*' has no README\.md that names"):
        splits(str(tmp_path), "en")


def test_an_empty_validation_split(tmp_path):
    """The text held out is that of `train`, where that is trained on."""
    (tmp_path / "hub").mkdir()
    for split, count in (("train", 20), ("validation", 0), ("test", 20)):
        lines = [json.dumps({"text": f"{split} {i} of some length"}) + "\n" for i in range(count)]
        (tmp_path / "hub" / f"{split}.jsonl").write_text("".join(lines))
    assert ensure(tmp_path / "hub", tmp_path / "cache").eval.documents > 0
    with pytest.raises(ConfigError, match=r"^data\.eval_split: got None, which holds no text"):
        ensure(tmp_path / "hub", tmp_path / "cache", split="test")


def test_a_folder_is_prepared(tmp_path):
    texts = {"train": [f"text {i} of some length" for i in range(40)], "validation": ["held out", "and this too"]}
    (tmp_path / "c4" / "en").mkdir(parents=True)
    (tmp_path / "c4" / "README.md").write_text(C4)
    for split, its in texts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in its).encode()
        (tmp_path / "c4" / "en" / f"c4-{split}.00000-of-00001.json.gz").write_bytes(gzip.compress(lines))
    corpus = ensure(tmp_path / "c4", tmp_path / "cache", name="en")
    assert (corpus.train.documents, corpus.eval.documents) == (40, 2)
    assert corpus.description.startswith(f"2 files, {tmp_path / 'c4'}, en: ")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, its in texts.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": its}), tmp_path / "hub" / "data" / f"{split}-0.parquet")
    assert ensure(tmp_path / "hub", tmp_path / "cache").fingerprint == corpus.fingerprint
