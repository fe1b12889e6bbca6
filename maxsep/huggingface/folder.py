"""A folder in Hugging Face's form, from whoever: JSON and safetensors in it are read, nothing is run or left.

Files may be symbolic links within the folder, or into the `blobs` beside it where the hub's own cache keeps contents.
"""

import json
import threading
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from maxsep.config import ConfigError, paths

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


class Stored(NamedTuple):
    """A tensor in one of the files."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


class Folder:
    """The folder that `flag` names.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, path: str, flag: str = "--checkpoint"):
        self.path, self.flag = paths.named(flag, path), flag
        if not self.path.is_dir():
            raise ConfigError(f"{flag}: got {path!r}, which is no folder; takes one with a config.json")
        self._opened: tuple[str, object] | None = None
        self._lock = threading.Lock()  # several threads may read

    def refuse(self, what: str) -> ConfigError:
        """The error for what is wrong with something in it."""
        return ConfigError(f"{self.flag}: {self.path}/{what}")

    def _checked(self, name) -> str:
        """A file's name in the index, if it is one."""
        if not isinstance(name, str) or not name or "\0" in name or PurePath(name).name != name:
            raise self.refuse(f"{INDEX}: got the file name {name!r}; takes names of files in the folder")
        return name

    def file(self, name: str) -> Path | None:
        """The file of that name; None where there is none.

        Raises:
            ConfigError: it leads out of the folder, or is no file.
        """
        path = self.path / name
        if not path.exists():
            return None
        real, home = path.resolve(), self.path.resolve()
        if not any(real.is_relative_to(root) for root in (home, home.parent.parent / "blobs")):
            raise self.refuse(f"{name}: leads to {real}; takes files in the folder")
        if not real.is_file():
            raise self.refuse(f"{name}: is no file; takes one")
        return path

    def json(self, name: str) -> dict | None:
        """The object in a JSON file; None where there is no such file.

        Raises:
            ConfigError: it holds something else.
        """
        path = self.file(name)
        if path is None:
            return None
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as e:
            raise self.refuse(f"{name}: cannot be read ({' '.join(str(e).split())}); takes a JSON object") from None
        if not isinstance(found, dict):
            raise self.refuse(f"{name}: got {type(found).__name__}; takes a JSON object")
        return found

    def tensors(self) -> dict[str, Stored]:
        """All tensors, of one file or of those that the index names; only headers are read.

        Raises:
            ConfigError: a file is missing or damaged, or not as the index says.
        """
        if self.file(WHOLE) is not None:
            return self._of_files([WHOLE])
        index = self.json(INDEX)
        if index is None:
            others = sorted(path.name for path in self.path.glob("*.bin")) + sorted(
                path.name for path in self.path.glob("*.pt*")
            )
            also = f"; {others[0]} may hold programs and is not opened" if others else ""
            raise ConfigError(f"{self.flag}: {self.path} has neither {WHOLE} nor {INDEX}{also}; takes safetensors")
        of = index.get("weight_map")
        if not isinstance(of, dict) or not of:
            raise self.refuse(f"{INDEX}: has no weight_map; takes one, from names of tensors to files")
        found = self._of_files(sorted(set(map(self._checked, of.values()))))
        for name, file in of.items():
            if name not in found or found[name].file != file:
                raise self.refuse(f"{file}: has no {name}, which {INDEX} says it has")
        return found

    def _of_files(self, names: Iterable[str]) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        for file in names:
            opened = self._open(file)
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                if name in found:
                    raise self.refuse(f"{file}: has {name}, which {found[name].file} has too; takes it once")
                tensor = opened.get_slice(name)
                found[name] = Stored(file, tuple(tensor.get_shape()), tensor.get_dtype())
        return found

    def _open(self, name: str):
        """The file, mapped. Only the last one stays so: what was read of a mapped file counts as memory in use."""
        if self._opened is not None and self._opened[0] == name:
            return self._opened[1]
        path = self.file(name)
        if path is None:
            raise self.refuse(f"{name}: is missing; takes all files that {INDEX} names")
        self._opened = None
        try:
            self._opened = name, safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as e:
            raise self.refuse(f"{name}: cannot be read ({' '.join(str(e).split())}); takes a whole file") from None
        return self._opened[1]

    def read(self, stored: Stored, name: str, where: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor: all of it as it lies in the mapped file, less than that as a copy.

        Raises:
            ConfigError: it cannot be read.
        """
        whole = all((cut.start, cut.stop) == (0, size) for cut, size in zip(where, stored.shape, strict=True))
        try:
            with self._lock:
                file = self._open(stored.file)
            return file.get_tensor(name) if whole else file.get_slice(name)[where]
        except (SafetensorError, OSError) as e:
            raise self.refuse(f"{stored.file}: {name} cannot be read ({' '.join(str(e).split())})") from None
