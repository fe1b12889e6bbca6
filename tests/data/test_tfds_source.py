import contextlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from corpora import read
from users import held_to_permissions

from maxsep.config import ConfigError
from maxsep.config.paths import REPOSITORY
from maxsep.data import tfds_source
from maxsep.data.tfds_source import find

TEXTS = {
    "train": [f"document {i}, ä{'.' * (i % 50)}" for i in range(300)],
    "validation": [f"validation {i}" for i in range(20)],
}


class Sample(tfds.core.GeneratorBasedBuilder):
    """Documents with C4's features."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {name: tfds.features.Text() for name in ("text", "url", "timestamp")}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in TEXTS}

    def _generate_examples(self, split):
        for i, text in enumerate(TEXTS[split]):
            yield i, {"text": text, "url": f"{split}/{i}", "timestamp": ""}


@pytest.fixture(scope="module")
def array_record(tmp_path_factory):
    """The data_dir of a dataset in two shards, `c4/en` by its folder's name."""
    data_dir = tmp_path_factory.mktemp("array_record")
    builder = Sample(data_dir=data_dir / "built", file_format="array_record")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    (data_dir / "c4").mkdir()
    shutil.move(data_dir / "built" / "sample", data_dir / "c4" / "en")
    return data_dir


@pytest.fixture(scope="module")
def tfrecord(array_record, tmp_path_factory):
    """The same dataset as tfrecord."""
    data_dir = tmp_path_factory.mktemp("tfrecord")
    version = data_dir / "c4" / "en" / "1.2.0"
    shutil.copytree(array_record / "c4" / "en" / "1.2.0", version)
    for path in version.glob("*array_record*"):
        whole = tfds_source.Part(str(path), 0, len(ArrayRecordDataSource([str(path)])), 0)
        with open(version / path.name.replace("array_record", "tfrecord"), "wb") as file:
            for record in tfds_source._array_records(whole):
                file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
        path.unlink()
    info = json.loads((version / "dataset_info.json").read_text()) | {"fileFormat": "tfrecord"}
    (version / "dataset_info.json").write_text(json.dumps(info))
    return data_dir


@pytest.fixture(params=["array_record", "tfrecord"])
def data_dir(request):
    return request.getfixturevalue(request.param)


def test_the_validation_split_is_held_out(data_dir, monkeypatch):
    monkeypatch.setattr(tfds_source, "DOCUMENTS", 64)
    train, held_out = read(find(str(data_dir), "c4/en"))
    assert sorted(train) == sorted(TEXTS["train"]) and sorted(held_out) == sorted(TEXTS["validation"])


def test_slices_are_of_any_split(data_dir):
    source = find(str(data_dir), "c4/en:1.2.0")
    train, held_out = read(source, None, "train[90%:]")
    assert sorted(train + held_out) == sorted(TEXTS["train"]) and 10 <= len(held_out) <= 50
    train, held_out = read(source, "validation[:50%]+train", "validation[50%:]")
    assert sorted(train + held_out) == sorted(TEXTS["train"] + TEXTS["validation"]) and held_out


def test_both_formats_give_the_same_texts(array_record, tfrecord):
    assert read(find(str(array_record), "c4/en")) == read(find(str(tfrecord), "c4/en"))


def test_parts_do_not_depend_on_anything_but_the_source(array_record, monkeypatch):
    source = find(str(array_record), "c4/en")
    whole = read(source)
    monkeypatch.setattr(tfds_source, "DOCUMENTS", 7)
    assert read(source) == whole


def test_the_newest_version_by_default(array_record, tmp_path):
    shutil.copytree(array_record, tmp_path, dirs_exist_ok=True)
    newer = tmp_path / "c4" / "en" / "1.10.0"
    shutil.copytree(tmp_path / "c4" / "en" / "1.2.0", newer)
    assert find(str(tmp_path), "c4/en").folder == newer
    assert find(str(tmp_path), "c4/en:1.2.0").folder.name == "1.2.0"


def test_the_fingerprint_is_of_the_files(array_record, tmp_path):
    copy = tmp_path / "1.2.0"
    shutil.copytree(array_record / "c4" / "en" / "1.2.0", copy)
    before = find(str(copy), None).fingerprint(print)
    assert before == find(str(array_record), "c4/en").fingerprint(print)
    with open(next(copy.glob("*train*0-of*")), "ab") as file:
        file.write(b"x")
    assert find(str(copy), None).fingerprint(print) != before


@pytest.mark.parametrize(
    "path, name, what",
    [
        ("nowhere", None, r"data\.path: got .*no such folder"),
        ("", None, r"data\.path: got .*takes a folder with dataset_info.json"),
        ("", "c4/de", r"data\.name: got 'c4/de'; takes a dataset prepared in .*: c4/en"),
        ("", "c4/en:3.1.0", r"data\.name: got 'c4/en:3.1.0'"),
        ("c4/en/1.2.0", "c4/en", r"data\.name: got 'c4/en'"),
    ],
)
def test_a_dataset_that_is_not_there_is_refused(array_record, path, name, what):
    with pytest.raises(ConfigError, match=f"^{what}"):
        find(str(array_record / path), name)


@pytest.mark.parametrize(
    "train, held_out, field",
    [
        ("test", None, "data.split"),
        ("train[:1", None, "data.split"),
        (None, "nothing[90%:]", "data.eval_split"),
        ("train", "train[90%:]", "data.split"),
        ("train[:95%]", "train[90%:]", "data.split"),
    ],
)
def test_wrong_splits_are_refused(data_dir, train, held_out, field):
    with pytest.raises(ConfigError, match=rf"^{field}: got ") as error:
        read(find(str(data_dir), "c4/en"), train, held_out)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["missing", "cut", "empty"])
def test_a_damaged_shard_is_named(data_dir, tmp_path, how):
    version = tmp_path / how
    shutil.copytree(data_dir / "c4" / "en" / "1.2.0", version)
    path = next(version.glob("*train*0-of*"))
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(content[: len(content) // 2 if how == "cut" else 0])
    with pytest.raises(ConfigError, match=r"^data\.path: .*" + path.name) as error:
        read(find(str(version), None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["c4/en", "c4/en/1.2.0", "c4/en/1.2.0/dataset_info.json", "c4/en/1.2.0/*train*0-of*"])
def test_what_may_not_be_read_is_named(array_record, tmp_path, what):
    shutil.copytree(array_record / "c4", tmp_path / "c4")
    (path,) = tmp_path.glob(what)
    path.chmod(0)
    code = (
        "from maxsep.data.tfds_source import find\n"
        f"source = find({str(tmp_path)!r}, 'c4/en')\nsource.fingerprint(print)\n"
        "for part in source.parts('train'): list(source.read(part))"
    )
    command = [*held_to_permissions(), sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    error = subprocess.run(command, env=environment, capture_output=True, text=True).stderr.splitlines()[-1]
    path.chmod(0o700)
    assert error.startswith("maxsep.config.schema.ConfigError: data.path: ")
    assert str(path) in error and "Permission denied" in error


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^data\.path: .* is no prepared dataset") as error:
        find(str(tmp_path), None).sizes()
    assert "\n" not in str(error.value)
