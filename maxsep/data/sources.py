"""Where text comes from: the sources behind `data.source`, all with the same methods.

- `description`: for the console; `bytes`: the text's size, roughly;
- `fingerprint(log)`: a hash that is another one when the text is; `quick_fingerprint()`: whether it is known without
  reading the text;
- `prepare(log)`: what has to be done once before reading;
- `sizes()`: of each split, as train or validation, the bytes of its text, roughly;
- `parts(split)`: the split in parts. Which these are depends on the source alone, so that any number of processes makes
  the same records of them;
- `read(part) -> iterator of Document`: what the part holds, in order.
"""

from pathlib import Path

from maxsep.config import DataConfig
from maxsep.data import tfds_source
from maxsep.data.files_source import FilesSource
from maxsep.data.tfds_source import DocstringsSource, TfdsSource

Source = DocstringsSource | TfdsSource | FilesSource


def find(data: DataConfig, cache_folder: Path) -> Source:
    """The source that the config names.

    Raises:
        ConfigError: nothing is there.
    """
    if data.source == "docstrings":
        return DocstringsSource(cache_folder)
    if data.source == "tfds":
        return tfds_source.find(data.path, data.name)
    return FilesSource(data.path, data.name, data.text_column, cache_folder)
