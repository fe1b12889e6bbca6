"""A .txt file, one document, in sections of some 8 KiB, so that a part of a book is held out.

A file's sections are dealt out evenly (a golden-ratio sequence) from the place of the first one on. So a long file has
a tenth of itself held out, and no section changes sides when the file grows, moves, or gets neighbours.
"""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from maxsep.config import ConfigError
from maxsep.data import files, splits
from maxsep.data.files import Cuts
from maxsep.data.splits import Document

SECTION = 8192  # bytes; a section ends with the line in which its last byte is
LINE = 4096  # bytes in which that line must end; if it does not, the section ends at the next character
_GOLDEN = (5**0.5 - 1) / 2


def cuts(size: int) -> Cuts:
    """Where a file of `size` bytes may be cut: about so many bytes, and sections, come before."""
    starts = range(0, size, max(SECTION, files.PIECE // SECTION * SECTION))
    return (*((start, start // SECTION) for start in starts), (size, -(-size // SECTION)))


def read(path: str, start: int, stop: int) -> Iterator[Document]:
    """The file's sections number `start` to `stop`, without the latter.

    Raises:
        ConfigError: text that is not UTF-8, or a file that cannot be read to its end.
    """
    with files.opened(path) as file:
        first = splits.place(next(_sections(file, 0), (b"", True))[0])

    def place(number: int) -> float:
        return (first + number * _GOLDEN) % 1

    with files.opened(path, max(0, start * SECTION - 1)) as file:
        for number, (content, last) in zip(range(start, stop), _sections(file, start), strict=False):
            at = f"{path}, from byte {number * SECTION} on"
            try:
                text = content.decode()
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"data.path: {path} is not UTF-8, near byte {number * SECTION + error.start}"
                ) from None
            yield Document(text, place(number), at, None if last else place(number + 1))


def _sections(file: BinaryIO, start: int) -> Iterator[tuple[bytes, bool]]:
    """The sections from number `start` on, each with whether it is the last; `file` stands a byte before the first."""
    ahead = b"\n" if start == 0 else b""  # from a byte before the section's nominal start on
    while True:
        while len(ahead) <= SECTION + LINE and (block := file.read(files.BLOCK)):
            ahead += block
        begin, end = _cut(ahead[: LINE + 1]), SECTION + _cut(ahead[SECTION : SECTION + LINE + 1])
        content = ahead[begin:end]
        if start == 0:
            content, start = content.removeprefix(codecs.BOM_UTF8), 1
        if content:
            yield content, end >= len(ahead)
        if end >= len(ahead):
            return
        ahead = ahead[SECTION:]


def _cut(block: bytes) -> int:
    """The start of the first line, or else of the first character, after the block's first byte."""
    newline = block.find(b"\n")
    if newline >= 0:
        return newline + 1
    start = 1
    while start < len(block) and block[start] & 0xC0 == 0x80:
        start += 1
    return start
