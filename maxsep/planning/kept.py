"""What compilations have found, kept in a folder by what it depends on."""

import functools
import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from maxsep.config import ConfigError, paths
from maxsep.output.durable import write_json
from maxsep.parallel.start import cores

SOURCE = (
    *(f"{package}/*.py" for package in ("config", "inference", "kernels", "measure", "model", "parallel", "training")),
    "planning/compilation.py",
    "planning/target.py",
)
# What a launcher or the start of training sets, and session.py for its children anew.
NO_MATTER = (
    "JAX_PLATFORMS",
    "JAX_NUM_CPU_DEVICES",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def key(job: dict[str, Any], versions: dict[str, str]) -> str:
    """A hash of the program that a job compiles, of its target, and of what compiles it.

    The program is known by its config and this package's source, as to trace it takes seconds.

    Args:
        job: as `compilation.job` makes it.
        versions: of what compiles for GPUs; empty for a cluster of CPUs.
    """
    config = {name: value for name, value in job["config"].items() if name not in ("name", "data")}
    data = {name: job["config"]["data"][name] for name in ("sequence_length", "cross_document_attention")}
    there = job["cluster"]
    cluster = {name: there[name] for name in ("gpu", "tpu", "nodes", "devices_per_node")}
    if there["gpu"] or there["tpu"]:
        cluster |= {name: there[name] for name in ("memory_bytes", "memory_bandwidth")}
    else:
        cluster |= _this_machine()
    settings = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_", "PJRT_"))}
    settings = {name: value for name, value in settings.items() if name not in NO_MATTER}
    libraries = {name: metadata.version(name) for name in LIBRARIES} | versions
    parts = [_source(), config, data, job["ids"], job["decode"], cluster, settings, libraries]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _this_machine() -> dict[str, Any]:
    """What XLA's CPU backend makes programs for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return {"machine": platform.machine(), "cores": cores(), "cpu": sorted({x for x in lines if x.startswith("flags")})}


@functools.cache
def _source() -> str:
    """A hash of the source that makes a program, and of what reads it."""
    root, found = paths.REPOSITORY / "maxsep", hashlib.sha256()
    for path in sorted(path for pattern in SOURCE for path in root.glob(pattern)):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()


def folder(named: str | None = None) -> Path:
    """Where results are kept: in the folder `named`, or else in this user's cache.

    Raises:
        ConfigError: there is neither.
    """
    if named is not None:
        return paths.named("--cache", named)
    cache = paths.user_cache()
    if cache is None:
        raise ConfigError("--cache: none given, and this user has no home; takes a folder to keep what is compiled in")
    return cache / "plans"


class Kept:
    """A folder of results, a JSON file each.

    Raises:
        ConfigError: there is no such folder and it cannot be made; of `write` also: the disk is full.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError("not writable")
        except OSError as e:
            raise self._error(e) from e

    def read(self, key: str) -> dict[str, Any] | None:
        """None: there is none, or it is damaged and will be found out again."""
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write(self, key: str, found: dict[str, Any]) -> None:
        try:
            write_json(self._path(key), found, None)
        except OSError as e:
            raise self._error(e) from e

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _error(self, e: OSError) -> ConfigError:
        return ConfigError(f"--cache: cannot write in {paths.shown(self.folder)}: {e.strerror or e}; takes a folder")
