"""A document a line, as JSON: .jsonl, and .json as the hub calls such files."""

import codecs
import io
import json
from collections.abc import Iterator

from maxsep.config import ConfigError
from maxsep.data import files, splits
from maxsep.data.files import Cuts
from maxsep.data.splits import Document


def read(path: str, cuts: Cuts, key: str) -> Iterator[Document]:
    """The text under `key` of each line between the first cut and the last.

    Raises:
        ConfigError: text that is not UTF-8, a line that is not JSON with such a text; it names file and line.
    """
    for piece, (_, lines) in zip(files.read_pieces(path, cuts), cuts, strict=False):
        for number, line in enumerate(io.BytesIO(piece), lines + 1):
            content = line.removeprefix(codecs.BOM_UTF8).strip()
            if not content:
                continue
            at = f"{path}:{number}"
            try:
                # From bytes it takes halves of surrogate pairs, UTF-16 and more.
                document = json.loads(content.decode())
            except UnicodeDecodeError:
                raise ConfigError(f"data.path: {at} is not UTF-8") from None
            except (ValueError, RecursionError) as error:
                what = "UTF-8" if b"\0" in content else f"JSON: {error}"  # English as UTF-16 is every other byte 0
                raise ConfigError(f"data.path: {at} is not {what}") from None
            text = document.get(key) if isinstance(document, dict) else None
            if not isinstance(text, str):
                raise ConfigError(f'data.path: {at} has no string under the key "{key}" (data.text_column)')
            encoded = text.encode("utf-8", "replace")  # JSON can spell half a surrogate pair, which is no character
            yield Document(text if text.isascii() else encoded.decode(), splits.place(encoded), at)
