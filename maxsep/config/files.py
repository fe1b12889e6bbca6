"""Config files: Python programs whose `get_config()` returns a ConfigDict."""

import inspect
import re
import runpy
import sys
import traceback
import types
from pathlib import Path

import ml_collections

from maxsep.config import paths
from maxsep.config.paths import REPOSITORY
from maxsep.config.schema import Config, ConfigError, from_config_dict


def load_config(path: str) -> Config:
    """What the `get_config()` of a config file returns, with the types checked. FILE:ARGUMENT gives it an argument.

    Raises:
        ConfigError: no such file, an error in it, or an unknown or mistyped field.
    """
    path, arguments = config_file(path)
    try:
        get_config = runpy.run_path(path)["get_config"]
        if arguments and not inspect.signature(get_config).parameters:
            raise ConfigError(
                f"--config: got {path}:{arguments[0]}; takes {path} alone: its get_config() has no argument"
            )
        values = get_config(*arguments)
    except ConfigError:  # which says itself what is wrong
        raise
    except Exception as e:  # the file is the user's program: whatever it raises is theirs to mend
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        what = "has no function get_config" if repr(e) == "KeyError('get_config')" else f"{type(e).__name__}: {e}"
        if near := re.search(r"Did you mean .*?\?", what):  # ml_collections tells much more about a mistyped field
            what = f"no such field; {near[0]}"
        raise ConfigError(f"--config: {where}: {what}") from e
    if not isinstance(values, ml_collections.ConfigDict):
        raise ConfigError(f"--config: {path}: get_config() returned {type(values).__name__}; takes a ConfigDict")
    return from_config_dict(values)


def config_file(named: str) -> tuple[str, list[str]]:
    """The file that `--config` names, made ready to be run, and the argument for its `get_config`, if there is one.

    Raises:
        ConfigError: no such file.
    """
    path, arguments = named, []
    if not paths.named("--config", path).is_file():
        path, *arguments = named.split(":", 1)
        if not arguments or not paths.named("--config", path).is_file():
            raise ConfigError(f"--config: got {named!r}, which is no file; takes a file like configs/tiny.py")
    importable(Path(path))
    return path, arguments


def importable(path: Path) -> None:
    """Makes `from configs import base` work in the file, wherever it lies and whatever else is called configs."""
    configs = types.ModuleType("configs")
    configs.__path__ = [str(REPOSITORY / "configs"), str(path.absolute().parent)]
    sys.modules["configs"] = configs


def listed(named: str, name: str) -> list[str]:
    """A list of strings that the config file has under `name`; [] where it has none.

    Raises:
        ConfigError: no such file, or `name` is something else.
    """
    path, _ = config_file(named)
    values = runpy.run_path(path).get(name, [])
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise ConfigError(f"--config: {path}: {name} is {values!r}; takes a list of strings")
    return list(values)
