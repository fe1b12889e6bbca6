"""A run's folder: `config.json`, `summary.json`, and what of the config may change when the run goes on.

config.json      the resolved config, and what the run depended on beside it
checkpoints/     maxsep/checkpoint.py
metrics.jsonl, tensorboard/    maxsep/metrics.py
summary.json     the result, at the end
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import jax

from maxsep.config import Config, ConfigError, fields, from_config_dict

# What may change when a run goes on: what changes its result by rounding at most, or only how long it runs and what it
# tells. Everything else is part of what the run means. A name ending in a dot stands for all fields of its section.
RESUME_MAY_CHANGE = (
    "name",
    "layout",
    "mesh.",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.profile",
    "train.nonfinite_limit",
    "train.deterministic",
    "optimizer.zero1",
    # Where the corpus lies. Its fingerprint must stay.
    "data.path",
    "data.name",
    "data.cache",
    "model.remat",
    "model.scan_layers",
    "model.attention_kernel",
)

PACKAGES = ("maxsep", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


def resolve(config: Config, stored: Config | None = None) -> Config:
    """`config` with what depends on the run's first start filled in; `stored`: that of the run that goes on."""
    if config.optimizer.decay_steps is not None:
        return config
    steps = config.train.steps if stored is None else stored.optimizer.decay_steps
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, decay_steps=steps))


def check_resume(workdir: Path, config: Config, corpus_fingerprint: str | None = None) -> Config:
    """`config` resolved, if the run in `workdir` may go on with it.

    Args:
        workdir: folder of a run that has a `config.json`.
        config: what is asked for.
        corpus_fingerprint: that of the corpus that `config` names; None: not known yet, and not compared.

    Raises:
        ConfigError: a field differs that may not, or the corpus does, or `config.json` cannot be read.
    """
    stored, record = read_config(workdir)
    config = resolve(config, stored)
    sections = tuple(name for name in RESUME_MAY_CHANGE if name.endswith("."))
    for field in fields():
        old, new = attrgetter(field.path)(stored), attrgetter(field.path)(config)
        if old != new and field.path not in RESUME_MAY_CHANGE and not field.path.startswith(sections):
            raise ConfigError(f"{field.path}: got {new!r}; the run in {workdir} has {old!r}, which may not change")
    if corpus_fingerprint not in (None, record["corpus"]):
        raise ConfigError(
            f"data.source: got another corpus than the run in {workdir} was started with, which may not change"
        )
    return config


def write_config(workdir: Path, config: Config, corpus_fingerprint: str) -> None:
    """Writes `config.json`: `config`, which `resolve` has completed, and what else the result depends on."""
    devices = jax.devices()
    record = {
        "config": dataclasses.asdict(config),
        "corpus": corpus_fingerprint,
        "command": sys.argv,
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
    }
    write_json(workdir / "config.json", record)


def read_config(workdir: Path) -> tuple[Config, dict]:
    """The config of the run in `workdir`, and all of its `config.json`.

    Raises:
        ConfigError: it is missing, no JSON, or of another version of the schema.
    """
    path = workdir / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return from_config_dict(record["config"]), record
    except FileNotFoundError:
        raise ConfigError(f"--workdir: {workdir} has no config.json; takes the folder of a run") from None
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"--workdir: {path} cannot be read: {type(e).__name__}: {e}") from e


def write_json(path: Path, values: dict) -> None:
    """Writes `values` as readable JSON; a reader sees the old file or the new one. What is not finite becomes null."""
    write_text(path, json.dumps(finite(values), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces the file at once, on disk when this returns: a kill leaves the old one or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def finite(value):
    """`value` with None for every float that JSON cannot write."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _git_commit() -> str | None:
    """The commit of the checkout that the package runs from, with -dirty where files differ; None outside of one."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
