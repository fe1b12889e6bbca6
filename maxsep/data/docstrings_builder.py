"""The default corpus as a TFDS dataset: array_record, C4's features. Apart, so that only building it imports TFDS."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import tensorflow_datasets as tfds

from maxsep.data import docstrings


class Docstrings(tfds.core.GeneratorBasedBuilder):
    """Documentation of the project's installed dependencies, a module a document."""

    VERSION = tfds.core.Version("1.0.0")
    documents: list[tuple[str, str]]  # url and text

    def _info(self) -> tfds.core.DatasetInfo:
        names = ("text", "url", "content-type", "content-length", "timestamp")
        versions = ", ".join(f"{package} {version}" for package, version in docstrings.versions().items())
        return self.dataset_info_from_configs(
            description=f"Docstrings of installed Python packages, cleaned by C4's rules: {versions}.",
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in names}),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for url, text in self.documents:
            size = str(len(text.encode()))
            # No time stamp: the same packages are the same corpus, whenever it is built.
            yield url, {"text": text, "url": url, "content-type": "text/plain", "content-length": size, "timestamp": ""}


def build(folder: Path, log: Callable[[str], None]) -> None:
    """Harvests the corpus and writes it below `folder`, unless it is there. Logs a line a package."""
    builder = Docstrings(data_dir=folder, file_format="array_record")
    builder.documents = list(docstrings.documents(log))
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints of a download; nothing is downloaded
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=1))
