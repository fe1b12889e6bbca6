"""What a trial's folder keeps between two starts of an ablation; told without JAX."""

import dataclasses
import json
import shutil
from pathlib import Path

from maxsep.ablation.trial import MAY_CHANGE, Trial
from maxsep.config import Config
from maxsep.output.durable import write_json

DUMPS = "program"  # folder of what XLA tells of the compiled train step
DECODE = "decode.jsonl"  # what `bench decode` has measured


def result(trial: Trial) -> dict | None:
    """What `write` has kept, if it is of the same run; with what was measured of decoding since, as `decode`.

    The run may have had more steps than are asked for now.
    """
    found, ended = _json(trial.folder / "result.json"), summary(trial)
    if found is None or ended is None or ended["steps"] != found["steps"][-1]:
        return None
    if _lasting(found["config"]) != _lasting(plain(trial.config)):
        return None
    path = trial.folder / DECODE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return found | {"decode": [json.loads(line) for line in lines] or None}


def write(trial: Trial, result: dict) -> None:
    """Keeps the result of a trial."""
    write_json(trial.folder / "result.json", result)


def summary(trial: Trial) -> dict | None:
    """The run's summary.json, if all of its steps are done."""
    found = _json(trial.folder / "summary.json")
    return found if found is not None and found["steps"] >= trial.config.train.steps else None


def tidy(folder: Path) -> None:
    """Removes of what XLA has dumped all that is not read: hundreds of files of machine code."""
    for path in folder.glob("*"):
        if not path.name.endswith(("_after_optimizations.txt", "-buffer-assignment.txt", "-live-range.txt")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def plain(config: Config) -> dict:
    """As JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _lasting(config: dict) -> dict:
    """The fields of a config, as JSON has it, that a figure depends on."""
    sections = {section: values for section, values in config.items() if isinstance(values, dict)}
    fields = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    fields |= {name: value for name, value in config.items() if name not in sections}
    return {name: value for name, value in fields.items() if name not in MAY_CHANGE}


def _json(path: Path) -> dict | None:
    """What a file has; None where there is none, or a damaged one: what it told is found out again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
