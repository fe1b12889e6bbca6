"""Text of a dataset that TFDS prepared, array_record or tfrecord, read without TensorFlow; so is the default corpus."""

import collections
import functools
import hashlib
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from maxsep.config import ConfigError, paths
from maxsep.data import cache, docstrings, files, intervals

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

    def check_splits(self, train: str | None, held_out: str | None) -> None:
        """Raises what `splits` does."""
        if train or held_out:
            self.splits(train, held_out)

    def splits(self, train: str | None, held_out: str | None) -> tuple[list[Part], list[Part]]:
        """The parts of the training and of the held-out text, named as TFDS does or by default (None).

        Raises:
            ConfigError: no such split, or a document in both.
        """
        names = _builder(self.folder).info.splits
        if held_out is None:
            held_out = "validation" if "validation" in names else "train[90%:]"
        of_held_out = self._parts("data.eval_split", held_out)
        train = train or self._rest(held_out)
        parts = self._parts("data.split", train), of_held_out
        for a, b in itertools.product(*parts):
            if a.filename == b.filename and a.skip < b.skip + b.take and b.skip < a.skip + a.take:
                raise ConfigError(f"data.split: got {train}, which overlaps the held-out split {held_out}")
        return tuple([piece for part in side for piece in self._pieces(part)] for side in parts)

    def _parts(self, field: str, split: str) -> list[Part]:
        splits = _builder(self.folder).info.splits
        try:
            instructions = splits[split].file_instructions
        except (KeyError, ValueError, AssertionError):
            takes = f"splits of {', '.join(sorted(splits))}, as train[:90%]"
            raise ConfigError(f"{field}: got {split}; takes {takes}") from None
        taken = collections.defaultdict(list)  # by file: a document is read once, however often slices name it
        parts = []
        for i in instructions:
            name, here = str(i.filename), (i.skip, i.skip + i.take)
            for start, stop in intervals.less(here, taken[name]):
                parts.append(Part(name, start, stop - start, i.examples_in_shard))
            taken[name].append(here)
        return parts

    def _rest(self, held_out: str) -> str:
        """What of `train` is not held out; all of it where that is another split."""
        import tensorflow_datasets as tfds

        infos = _builder(self.folder).info.splits
        if "train" not in infos:
            return "train"  # and refused as such
        whole = infos["train"].num_examples
        slices = tfds.core.ReadInstruction.from_spec(held_out).to_absolute(infos)
        taken = [(s.from_ or 0, whole if s.to is None else s.to) for s in slices if s.splitname == "train"]
        if not taken:
            return "train"
        rest = [f"train[{start}:{stop}]" for start, stop in intervals.less((0, whole), taken)]
        if not rest:
            raise intervals.nothing_left(held_out)
        return "+".join(rest)

    def _pieces(self, part: Part) -> Iterator[Part]:
        """Short parts, where a file can be read from anywhere."""
        size = part.take if _is_tfrecord(self.folder) else DOCUMENTS
        for skip in range(part.skip, part.skip + part.take, size):
            take = min(size, part.skip + part.take - skip)
            yield Part(part.filename, skip, take, part.examples_in_shard)

    def read(self, part: Part) -> Iterator[tuple[str, bool, str]]:
        """The part's texts, each with True, as a document ends with it, and where it lies.

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
                yield text.decode() if isinstance(text, bytes) else text, True, at
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

    def check_splits(self, train: str | None, held_out: str | None) -> None:
        """Refuses what cannot be one, without building the corpus, which has the split `train` alone."""
        for field, split in (("data.split", train), ("data.eval_split", held_out)):
            terms = (split or "train").split("+")
            if not all(re.fullmatch(r"train(\[(-?[\d.]+%?)?:(-?[\d.]+%?)?\])?", term.strip()) for term in terms):
                raise ConfigError(f"{field}: got {split}; takes slices of train, as train[:90%]")

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
            yield records[i]


def _tfrecords(part: Part) -> Iterator[bytes]:
    import grain

    records = grain.experimental.TFRecordIterDataset(part.filename)
    yield from itertools.islice(records, part.skip, part.skip + part.take)
