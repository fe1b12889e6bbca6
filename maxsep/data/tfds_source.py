"""Text of a dataset that TFDS prepared, array_record or tfrecord, read without TensorFlow; so is the default corpus."""

import functools
import hashlib
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from maxsep.config import ConfigError, paths
from maxsep.data import cache, docstrings, files, splits
from maxsep.data.splits import Document

DOCUMENTS = 4096  # a part, of array_record
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclass(frozen=True)
class Part:
    """Documents `skip` to `skip + take` of a file. The fields that array_record's and TFDS's file instructions have."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class TfdsSource:
    """A prepared version of a dataset: a folder with dataset_info.json and its shards."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.description = f"TFDS dataset {folder}"

    @property
    def bytes(self) -> int:
        """Size of the text, roughly."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def prepare(self, log: Callable[[str], None]) -> None:
        """What is still to do before the text can be read: nothing."""

    def fingerprint(self, log: Callable[[str], None]) -> str:
        """Hash of the dataset's description and its files' names and sizes."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            if path.suffix == ".json":
                files.check(str(path))
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def quick_fingerprint(self) -> bool:
        """Whether `fingerprint` is known without reading the text."""
        return True

    def sizes(self) -> dict[str, int]:
        """Bytes of text of each split, roughly.

        Raises:
            ConfigError: the folder is no prepared dataset.
        """
        return {name: split.num_bytes or 0 for name, split in _builder(self.folder).info.splits.items()}

    def parts(self, split: str) -> Iterator[Part]:
        """The split in stretches: short ones where a file can be read from anywhere."""
        for i in _builder(self.folder).info.splits[split].file_instructions:
            size = i.take if _is_tfrecord(self.folder) else DOCUMENTS
            for skip in range(i.skip, i.skip + i.take, size):
                take = min(size, i.skip + i.take - skip)
                yield Part(str(i.filename), skip, take, i.examples_in_shard)

    def read(self, part: Part) -> Iterator[Document]:
        """The part's documents.

        Raises:
            ConfigError: a file that is missing or damaged, or not UTF-8.
        """
        features = _builder(self.folder).info.features
        name = _text_feature(self.folder)
        records = _tfrecords(part) if _is_tfrecord(self.folder) else _array_records(part)
        count = 0
        try:
            for record in records:
                text = features.deserialize_example_np(record)[name]
                at = f"{part.filename}: document {part.skip + count}"
                content = text if isinstance(text, bytes) else text.encode()
                yield Document(content.decode(), splits.place(content), at)
                count += 1
        except UnicodeDecodeError:
            raise ConfigError(f"data.path: {at} is not UTF-8") from None
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(f"data.path: {part.filename}: {' '.join(str(error).split())}") from None
        if count != part.take:
            raise ConfigError(f"data.path: {part.filename}: has fewer documents than dataset_info.json says")


class DocstringsSource(TfdsSource):
    """The default corpus, built in the cache folder when it is first read."""

    bytes = 0  # small

    def __init__(self, cache_folder: Path):
        self._root = cache_folder / "docstrings" / docstrings.fingerprint()[:16]
        super().__init__(self._root / "docstrings" / "1.0.0")
        self.description = "docstrings of installed Python packages"

    def sizes(self) -> dict[str, int]:
        """Its one split, known without building the corpus."""
        return {"train": self.bytes}

    def fingerprint(self, log: Callable[[str], None]) -> str:
        """Hash of what the corpus is built from, known before it is built."""
        return docstrings.fingerprint()

    def prepare(self, log: Callable[[str], None]) -> None:
        with cache.locked(self._root, log):
            if not self.folder.exists():
                from maxsep.data import docstrings_builder

                log(f"building the default corpus, {self.description}")
                shutil.rmtree(self._root, ignore_errors=True)  # what a process that was killed had begun
                try:
                    docstrings_builder.build(self._root, log)
                except RuntimeError as error:  # what TFDS makes of a full disk
                    raise OSError(" ".join(str(error).split())) from None
                finally:
                    if not self.folder.exists():
                        shutil.rmtree(self._root, ignore_errors=True)


def find(path: str, name: str | None) -> TfdsSource:
    """The dataset `name` (as c4/en or c4/en:3.1.0; the newest version by default) below `path`, or `path` itself.

    Found by its folder, not by the registry of datasets: what is prepared is readable, whether TFDS knows it or not.

    Raises:
        ConfigError: no prepared dataset there.
    """
    folder = paths.named("data.path", path)
    if not folder.is_dir():
        raise ConfigError(f"data.path: got {path!r} (no such folder); takes the folder of a prepared dataset")
    if name is None:
        if not (folder / "dataset_info.json").exists():
            takes = "a folder with dataset_info.json, or a data_dir with the dataset's name in data.name"
            raise ConfigError(f"data.path: got {path!r}; takes {takes}")
        return TfdsSource(folder.absolute())
    dataset, _, version = name.partition(":")
    found = {info.parent.name: info.parent for info in _infos(folder / dataset)}
    versions = sorted(filter(_VERSION.fullmatch, found), key=lambda v: [int(n) for n in v.split(".")])
    if not versions or version not in ("", *versions):
        infos = [info for depth in ("*/*", "*/*/*") for info in folder.glob(f"{depth}/dataset_info.json")]
        there = sorted({str(info.parents[1].relative_to(folder)) for info in infos})
        takes = f"a dataset prepared in {path}: {', '.join(there) or 'there is none'}"
        raise ConfigError(f"data.name: got {name!r}; takes {takes}")
    return TfdsSource(found[version or versions[-1]].absolute())


def _infos(folder: Path) -> Iterator[Path]:
    """The descriptions of a dataset's prepared versions. `glob` would pass over those that this user may not read."""
    if paths.named("data.path", str(folder)).is_dir():
        for version in folder.iterdir():
            info = paths.named("data.path", str(version)) / "dataset_info.json"
            if info.exists():
                yield info


@functools.cache
def _builder(folder: Path):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS and its parsers raise all kinds for a folder that is not one
        reason = " ".join(str(error).split())
        raise ConfigError(f"data.path: {str(folder)!r} is no prepared dataset: {reason}") from None


def _is_tfrecord(folder: Path) -> bool:
    file_format = _builder(folder).info.file_format.value
    if file_format not in ("tfrecord", "array_record"):
        raise ConfigError(f"data.path: {str(folder)!r} is {file_format}; takes array_record or tfrecord")
    return file_format == "tfrecord"


@functools.cache
def _text_feature(folder: Path) -> str:
    import tensorflow_datasets as tfds

    features = _builder(folder).info.features
    texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if "text" in texts or len(texts) == 1:
        return "text" if "text" in texts else texts[0]
    raise ConfigError(f"data.path: {str(folder)!r} has the features {', '.join(features)}; takes one with a text")


def _array_records(part: Part) -> Iterator[bytes]:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    with ArrayRecordDataSource([part]) as records:
        for i in range(part.take):
            record = records[i]
            if not record:  # what is read from a file that was cut
                raise ValueError(f"document {part.skip + i} is empty")
            yield record


def _tfrecords(part: Part) -> Iterator[bytes]:
    import grain

    records = grain.experimental.TFRecordIterDataset(part.filename)
    yield from itertools.islice(records, part.skip, part.skip + part.take)
