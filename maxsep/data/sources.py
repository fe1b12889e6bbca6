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
from maxsep.data.base_tokenizer import Tokenizer
from maxsep.data.files_source import FilesSource
from maxsep.data.text_files import TextFiles
from maxsep.data.tfds_source import DocstringsSource, TfdsSource
from maxsep.data.token_files import TokenFiles

Source = DocstringsSource | TfdsSource | FilesSource


def find(data: DataConfig, tokenizer: Tokenizer, cache_folder: Path) -> Source:
    """The source that the config names; `tokenizer` tells what ids are.

    Raises:
        ConfigError: nothing is there.
    """
    if data.source == "docstrings":
        return DocstringsSource(cache_folder)
    if data.source == "tfds":
        return tfds_source.find(data.path, data.name)
    if data.source == "tokens":
        formats = TokenFiles(data.tokenizer, tokenizer.vocab_size, tokenizer.end_of_text)
    else:
        formats = TextFiles(data.text_column)
    return FilesSource(data.path, data.name, formats, cache_folder)
