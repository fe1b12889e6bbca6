"""A run's folder: what lies in it, whether a run may start there, and what of its config may change when it goes on.

config.json      the resolved config, and what the run depended on beside it
checkpoints/     maxsep/output/checkpoint.py
metrics.jsonl, tensorboard/    maxsep/output/metrics.py
summary.json     the result, at the end
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

from maxsep.cluster.job import Job
from maxsep.config import Config, ConfigError, cli, fields, paths
from maxsep.config.checksum import checksum
from maxsep.config.stored import read_config
from maxsep.output.durable import finite, write_json

# What may change when a run goes on: what changes its result by rounding at most, or only how long it runs and what it
# tells. Everything else is part of what the run means. A name ending in a dot stands for all fields of its section.
RESUME_MAY_CHANGE = (
    "name",
    "layout",
    "cluster",
    "mesh.",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.profile",
    "train.nonfinite_limit",
    "train.rollbacks",
    "train.heartbeat_seconds",
    "train.watchdog_seconds",
    "train.deterministic",
    "optimizer.zero1",
    # Where the corpus and its tokenizer lie. Their fingerprints must stay.
    "data.path",
    "data.name",
    "data.cache",
    "data.tokenizer",
    "data.begin_prompts",
    "model.remat",
    "model.scan_layers",
    "model.attention_kernel",
    "model.float32_precision",
    "model.exchange_factor",
)

SHARED = "takes a folder that all processes share"
ALIKE_SECONDS = 30.0  # until all processes find the same in a folder
SHARED_SECONDS = 10.0  # until a file of another host is seen: network file systems remember what was not there
CHECKPOINTS = "checkpoints"  # a step's folder in it appears when the step is saved whole

RESULTS = ("metrics.jsonl", "summary.json", "tensorboard")  # what a run would write over

# An evaluation may also be without drops, and in batches that fit the mesh.
EVALUATION_MAY_CHANGE = (
    *RESUME_MAY_CHANGE,
    "train.batch_size",
    "train.accumulation",
    "model.capacity_factor",
    "model.capacity_group",
)

# What inference takes: where the weights lie, how they are computed with, and how long a text may be.
INFERENCE_TAKES = (
    "layout",
    "mesh.stage",
    "mesh.attention",
    "mesh.expert",
    "mesh.inner",
    "data.sequence_length",
    "data.tokenizer",
    "data.begin_prompts",
    "model.attention_kernel",
    "model.dtype",
    "model.float32_precision",
)

PACKAGES = ("maxsep", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


def check_start(folder: Path, config: Config, training: bool) -> None:
    """Refuses, before anything slow, a run that cannot start: without JAX, and without its corpus.

    Raises:
        ConfigError: the run in `folder` may not go on with `config`, there is no checkpoint to evaluate
            (not `training`), or `train.init_from` has none.
    """
    check_not_imported(folder)
    saved = has_checkpoint(folder)
    if not saved:
        check_not_gone("--workdir", folder)
    if not training and not saved:
        raise no_checkpoint("--workdir", folder)
    if not saved and not (folder / "config.json").exists():
        for name in RESULTS:
            if (folder / name).exists():
                why = f"which has a {name} but no config.json: it is not a run's"
                raise ConfigError(f"--workdir: got {folder}, {why}; takes a new folder, or that of a run")
    else:
        check_resume(folder, config, may_change=RESUME_MAY_CHANGE if training else EVALUATION_MAY_CHANGE)
    if not saved:
        init_checkpoints(config)


def check_not_imported(folder: Path) -> None:
    """Refuses the folder of a model that maxsep.convert has imported, as that of a run to go on.

    Raises:
        ConfigError: it is one.
    """
    if (folder / "config.json").exists() and "imported" in read_config(folder)[1]:
        why = "an imported model, without a corpus or an optimizer to resume"
        train = paths.command("train.py", "--workdir=NEW", f"--config.train.init_from={paths.shown(folder)}")
        raise ConfigError(f"--workdir: got {folder}, {why}; takes another folder, as {train}")


def check_not_gone(flag: str, folder: Path) -> None:
    """Refuses the folder of a run that has saved a step, and has no checkpoint now: it would begin anew.

    Raises:
        ConfigError: `checkpoints` leads to nothing, or the run's config or summary tells that a step was saved.
    """
    directory = folder / CHECKPOINTS
    if os.path.lexists(directory) and not directory.is_dir():
        what = (
            f"is a link to {os.readlink(directory)}, which is not there" if directory.is_symlink() else "is no folder"
        )
        raise ConfigError(f"{flag}: {directory} {what}; takes a folder of checkpoints, or none")
    if not (folder / "config.json").exists():
        return
    if read_config(folder)[1].get("saved") or (folder / "summary.json").exists():
        takes = f"takes them back in {directory}, or another folder"
        raise ConfigError(
            f"{flag}: the checkpoints of the run in {folder} are gone (its disk may not be mounted); {takes}"
        )


def no_checkpoint(flag: str, folder: Path) -> ConfigError:
    """The error for a folder that has none."""
    return ConfigError(f"{flag}: got {folder}, which has no checkpoint; takes the folder of a run that saved one")


def check_inference(folder: Path, config: Config, step: str) -> None:
    """Refuses, before anything slow, a run that cannot be used with `config`, its own but for `INFERENCE_TAKES`.

    Raises:
        ConfigError: it has no checkpoint, or not that of `step` (a number, latest or best).
    """
    if step not in ("latest", "best") and not step.isdecimal():
        raise ConfigError(f"--step: got {step!r}; takes the number of a step, latest or best")
    if not has_checkpoint(folder):
        check_not_gone("--workdir", folder)
        raise no_checkpoint("--workdir", folder)
    steps = sorted(int(entry.name) for entry in (folder / CHECKPOINTS).iterdir() if entry.name.isdigit())
    if step.isdecimal() and int(step) not in steps:
        raise ConfigError(f"--step: got {step}; {folder} has {', '.join(map(str, steps))}; takes one of them")


def check_tokenizer(folder: Path, config: Config, fingerprint: str) -> None:
    """Refuses another tokenizer than that of the run in `folder`, if there is one; its file may have moved.

    Args:
        fingerprint: of the tokenizer that `config` names.

    Raises:
        ConfigError: its ids mean something else.
    """
    if not (folder / "config.json").exists():
        return
    stored, record = read_config(folder)
    own, given = stored.data.tokenizer, config.data.tokenizer
    # A run of before fingerprints were stored goes by the names.
    same = own == given or (own.endswith(".json") and given.endswith(".json"))
    if not (record["tokenizer"] == fingerprint if "tokenizer" in record else same):
        other = ", with another content" if own == given else ""
        raise ConfigError(
            f"data.tokenizer: got {given!r}{other}; the run in {folder} has {own!r}, whose ids may not change"
        )


def newest() -> Path:
    """The folder of the run under runs/ that saved a checkpoint last.

    Raises:
        ConfigError: there is none.
    """
    saved = [path.parent for path in paths.named("--workdir", "runs").glob(f"*/{CHECKPOINTS}")]
    saved = [folder for folder in saved if has_checkpoint(folder)]
    if not saved:
        raise ConfigError(
            "--workdir: none given, and there is no run with a checkpoint under runs/; takes the folder of a run, "
            "as `python train.py` makes one"
        )
    return max(saved, key=lambda folder: (folder / CHECKPOINTS).stat().st_mtime)


def has_checkpoint(folder: Path) -> bool:
    """Whether the run in `folder` has saved a step."""
    directory = paths.named("--workdir", str(folder / CHECKPOINTS))
    return directory.is_dir() and any(entry.name.isdigit() for entry in directory.iterdir())


def init_checkpoints(config: Config) -> Path | None:
    """The folder of checkpoints that `train.init_from` names.

    Raises:
        ConfigError: it has none.
    """
    if config.train.init_from is None:
        return None
    source = paths.named("train.init_from", config.train.init_from).resolve()
    if not has_checkpoint(source):
        check_not_gone("train.init_from", source)
        raise no_checkpoint("train.init_from", source)
    return source / CHECKPOINTS


def resolve(config: Config, stored: Config | None = None) -> Config:
    """`config` with what depends on the run's first start filled in; `stored`: that of the run that goes on."""
    if config.optimizer.decay_steps is not None:
        return config
    # A run that ends before its warm-up has a schedule too, if it goes on.
    new = max(config.train.steps, config.optimizer.warmup_steps)
    steps = new if stored is None else stored.optimizer.decay_steps
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, decay_steps=steps))


def check_resume(
    workdir: Path,
    config: Config,
    corpus_fingerprint: str | None = None,
    may_change: tuple[str, ...] = RESUME_MAY_CHANGE,
) -> Config:
    """`config` resolved, if the run in `workdir` may go on with it.

    Args:
        workdir: folder of a run that has a `config.json`.
        config: what is asked for.
        corpus_fingerprint: that of the corpus that `config` names; None: not known yet, and not compared.
        may_change: the fields that may differ.

    Raises:
        ConfigError: a field differs that may not, or the corpus does, or `config.json` cannot be read.
    """
    stored, record = read_config(workdir)
    config = resolve(config, stored)
    sections = tuple(name for name in may_change if name.endswith("."))
    for field in fields():
        old, new = attrgetter(field.path)(stored), attrgetter(field.path)(config)
        if old != new and field.path not in may_change and not field.path.startswith(sections):
            raise ConfigError(f"{field.path}: got {new!r}; the run in {workdir} has {old!r}, which may not change")
    if corpus_fingerprint not in (None, record["corpus"]):
        why = " (it follows the installed packages' versions)" if config.data.source == "docstrings" else ""
        raise ConfigError(
            f"data.source: got another corpus{why} than the run in {workdir} was started with, which may not change"
        )
    return config


def found_alike(folder: Path, job: Job, find: Callable[[], list]) -> list:
    """What all processes of the job `find` in a run's folder. Network file systems show changes late: they may retry.

    Raises:
        cli.Exit: they still find different things after `ALIKE_SECONDS`.
    """
    end = time.monotonic() + ALIKE_SECONDS
    while True:
        found, last = find(), time.monotonic() > end
        answers = job.agree([found, last])
        other = next(
            (member for member, (one, _) in zip(job.members, answers, strict=True) if one != answers[0][0]), None
        )
        if other is None:
            return found
        if any(last for _, last in answers):
            what = f"--workdir: {folder} still holds something else for {other} than for {job.members[0]}"
            raise cli.Exit(cli.RESTART, f"{what} after {ALIKE_SECONDS:g} s; {SHARED}")
        time.sleep(1)


def check_shared(folder: Path, job: Job) -> None:
    """Makes sure that all processes of the job see what the first writes into a run's folder, which exists.

    Raises:
        ConfigError: one does not.
    """
    if job.count == 1:
        return
    token = folder / job.agree(f".{uuid.uuid4().hex}.tmp")[0]
    if job.first:
        token.touch()
    job.agree(None)
    end = time.monotonic() + SHARED_SECONDS
    while not (seen := token.exists()) and time.monotonic() < end:
        time.sleep(0.5)
    blind = [member for member, sees in zip(job.members, job.agree(seen), strict=True) if not sees]
    if job.first:
        token.unlink()
    if blind:
        raise ConfigError(f"--workdir: {blind[0]} does not see what process 0 writes in {folder}; {SHARED}")


def write_config(
    workdir: Path, config: Config, corpus_fingerprint: str | None, tokenizer_fingerprint: str, **more
) -> None:
    """Writes `config.json`: `config`, which `resolve` has completed, and what else the result depends on.

    No corpus: of a model that was imported, of which `more` tells.
    """
    import jax  # here, as the checks above are made before JAX starts

    record = {
        "config": dataclasses.asdict(config),
        "corpus": corpus_fingerprint,
        "tokenizer": tokenizer_fingerprint,
        "command": sys.argv,
        "git_commit": _git_commit(),
        "versions": _versions(),
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": len(jax.devices()),
            "processes": jax.process_count(),
        },
        **more,
    }
    record = json.loads(json.dumps(finite(record)))  # as it will be read
    write_json(workdir / "config.json", record | {"checksum": checksum(record)})


def of_this_machine(workdir: Path) -> bool:
    """Whether the run in `workdir` has last been trained with these versions, on this kind of device."""
    import jax

    _, record = read_config(workdir)
    same = record.get("versions") == _versions()
    return same and record.get("devices", {}).get("kind") == jax.devices()[0].device_kind


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}


def _git_commit() -> str | None:
    """The commit of the checkout that the package runs from, with -dirty where files differ; None outside of one."""
    if not (paths.REPOSITORY / ".git").exists():
        return None
    command = ["git", "-C", str(paths.REPOSITORY), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
