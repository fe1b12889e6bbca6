"""Files of text: .parquet, .jsonl, .txt. `.json` is taken as .jsonl, as on Hugging Face's hub."""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from maxsep.data import files, json_lines, parquet, text_sections
from maxsep.data.files import Cuts, Part, Scan
from maxsep.data.splits import Document

_ENDINGS = re.compile(r".*\.(?:(parquet)|(?:(jsonl?|txt)(?:\.(gz|xz|bz2|zst))?))", re.DOTALL)
_EXPANSION = {"gz": 3, "xz": 3, "bz2": 3, "zst": 3, "parquet": 2}  # text is about so much larger than such a file


@dataclass(frozen=True)
class TextFiles:
    """How files of text are read; `column` of .parquet, or the key of .jsonl, has the text."""

    column: str

    takes = "a glob of .parquet, .jsonl or .txt files, the latter two also .gz, .xz, .bz2, .zst; or a dataset's folder"
    # In a folder the first kind that is there: a README.txt beside parquet files is none of the data.
    endings = (r"\.parquet", r"\.(jsonl|jsonl\.\w+|json\.\w+)", r"\.json", r"\.(txt|txt\.\w+)")

    def of(self, paths: list[str]) -> list[str]:
        """Those of the paths that are files of their own."""
        return paths

    def kind(self, path: str) -> str | None:
        """parquet, jsonl, txt, or None for none of them."""
        match = _ENDINGS.fullmatch(path)
        return match and (match[1] or ("txt" if match[2] == "txt" else "jsonl"))

    def state(self, path: str) -> str:
        """What changes when the file does."""
        return files.state(path)

    def size(self, path: str) -> int:
        """Bytes of text, roughly."""
        return os.path.getsize(path) * _EXPANSION.get(files.compression(path) or self.kind(path), 1)

    def check(self, paths: Iterable[str]) -> None:
        """Has a wrong column answered at once; the other files are read when they are prepared."""
        for path in paths:
            if self.kind(path) == "parquet":
                parquet.check(path, self.column)
                return

    def scan(self, path: str) -> Scan:
        """Reads the whole file."""
        scan = files.scan(path)
        match self.kind(path):
            case "txt":
                return dataclasses.replace(scan, cuts=text_sections.cuts(scan.cuts[-1][0]))
            case "parquet":
                return dataclasses.replace(scan, cuts=parquet.cuts(path))
        return scan

    def parts(self, path: str, cuts: Cuts) -> Iterator[Part]:
        # What is compressed can only be read from its start.
        for of_part in [cuts] if files.compression(path) else itertools.pairwise(cuts):
            yield Part(path, of_part)

    def read(self, part: Part) -> Iterator[Document]:
        start, stop = part.cuts[0][1], part.cuts[-1][1]
        match self.kind(part.path):
            case "jsonl":
                return json_lines.read(part.path, part.cuts, self.column)
            case "txt":
                return text_sections.read(part.path, start, stop)
            case "parquet":
                return parquet.read(part.path, start, stop, self.column)
