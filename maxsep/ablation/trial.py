"""One run of an ablation: a layout on a mesh, as `ma:4x4`, over the config that all runs share."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from maxsep.config import Config, ConfigError, runs
from maxsep.config.validate import validate

STRATEGIES = {"tp": "TP", "pp": "PP", "tp_pp": "TP, PP", "ma": "MA"}  # what the study compares, by layout
# What may differ when an ablation goes on: no figure of a run that has finished depends on it.
MAY_CHANGE = (
    "train.steps",
    "train.profile",
    "train.eval_every",
    "train.checkpoint_every",
    "train.nonfinite_limit",
    "train.rollbacks",
    "train.heartbeat_seconds",
    "train.watchdog_seconds",
    "data.path",
    "data.cache",
    "data.tokenizer",
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is to be run. `flags` are those of train.py that make `config` of the shared one."""

    name: str
    config: Config
    flags: tuple[str, ...]
    folder: Path

    @property
    def devices(self) -> int:
        return self.config.mesh.devices


def trials(named: Sequence[str], config: Config, folder: Path) -> list[Trial]:
    """The runs that are written as `runs.TAKES` says, each in a folder of its own under `folder`.

    Raises:
        ConfigError: one is mistyped, is there twice, or does not fit the config: which, and the field to set.
    """
    out: list[Trial] = []
    for run in named:
        made = _trial(run.strip(), config, folder)
        if any(made.folder == other.folder for other in out):
            raise ConfigError(f"--runs: got {made.name} twice; takes each once")
        out.append(made)
    if not out:
        raise ConfigError(f"--runs: none given; takes {runs.TAKES}")
    return out


def _trial(run: str, config: Config, folder: Path) -> Trial:
    layout, mesh = runs.parse(run, config.mesh)
    train = config.train
    if train.profile is None:  # the last two steps
        train = dataclasses.replace(train, profile=f"{max(1, train.steps - 1)}:{train.steps}")
    train = dataclasses.replace(train, log_every=1)
    made = dataclasses.replace(config, layout=layout, mesh=mesh, train=train)
    try:
        validate(made)
    except ConfigError as e:
        raise ConfigError(f"--runs: {run}: {e}") from e
    flags = (*runs.flags(layout, mesh), "--config.train.log_every=1", f"--config.train.profile={train.profile}")
    name = runs.name(layout, mesh)
    return Trial(name, made, flags, folder / re.sub(r"[^\w]+", "-", name).strip("-"))


def columns(names: Sequence[str]) -> dict[str, str]:
    """The names that stand for the study's strategies, each the first of its layout, by the strategy; in its order."""
    found = {}
    for layout, label in STRATEGIES.items():
        for name in names:
            if name.rpartition(":")[0] == layout:
                found.setdefault(label, name)
    return found
