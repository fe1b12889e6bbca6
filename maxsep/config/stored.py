"""The config that a run was started with, as its folder keeps it. output/workdir.py writes it."""

import json
from dataclasses import replace
from pathlib import Path

from maxsep.config.checksum import checksum
from maxsep.config.schema import Config, ConfigError, from_config_dict

OWN_TOKENIZER = "tokenizer.json"  # of an imported model, in its folder


def read_config(workdir: Path) -> tuple[Config, dict]:
    """The config of the run in `workdir`, and all of its `config.json`.

    Raises:
        ConfigError: it is missing, damaged, or of another version of the schema.
    """
    path = workdir / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("checksum", None) not in (None, checksum(record)):  # None: by an older version
            raise ConfigError("damaged, or edited: it does not have its checksum; takes it as it was, and flags")
        if "config" not in record and "model_type" in record:
            how = f"python -m maxsep.convert import --checkpoint={workdir} --workdir=NEW"
            raise ConfigError(f"is a Hugging Face model's; takes a run's, as {how} makes one of it")
        return at_home(from_config_dict(record["config"]), workdir), record
    except FileNotFoundError:
        raise ConfigError(f"--workdir: {workdir} has no config.json; takes the folder of a run") from None
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"--workdir: {path} cannot be read: {type(e).__name__}: {e}") from e


def at_home(config: Config, workdir: Path) -> Config:
    """The config, with the path of the tokenizer that lies in the run's own folder, wherever that is now."""
    if config.data.tokenizer != OWN_TOKENIZER or not (workdir / OWN_TOKENIZER).is_file():
        return config
    return replace(config, data=replace(config.data, tokenizer=str(workdir / OWN_TOKENIZER)))
