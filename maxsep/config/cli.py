"""What every command line shares: flags, config overrides, `--help`, one-line errors, exit statuses.

A tool is a module docstring, a function that defines its flags, and a `main` that takes the parsed `Args`:

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)

    def main(args: cli.Args) -> None:
        ...

    if __name__ == "__main__":
        sys.exit(cli.run(main, define, __doc__, default_config="configs/tiny.py"))

absl alone would answer a mistyped flag with status 1 and a mistyped config field with a traceback.
"""

import os
import re
import runpy
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from maxsep.config import paths
from maxsep.config.paths import REPOSITORY
from maxsep.config.schema import Config, ConfigError, fields, from_config_dict, mistyped, to_config_dict, unknown_field
from maxsep.config.stored import read_config
from maxsep.config.validate import validate

# Exit statuses; anything that is nobody's mistake but a crash is CRASHED.
DONE, USER_ERROR, CRASHED, PEER_LOST, NONFINITE, SAVE_FAILED, STOPPED = 0, 2, 70, 71, 72, 73, 75


class Exit(Exception):
    """Ends the program with a status other than 0 and one line that says why."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Args:
    """A parsed command line."""

    flags: flags.FlagValues  # the tool's own, as attributes
    config: Config | None  # checked; None for a tool that takes none
    fit_mesh: bool  # neither a config, a run nor a field of the mesh was named: the mesh may follow the machine
    command: str | None  # train in `bench train`; None for a tool without commands


def run(
    main: Callable[[Args], None],
    define: Callable[[flags.FlagValues], None],
    doc: str,
    default_config: str | None = None,
    commands: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the command line, calls `main`, and turns whatever happens into an exit status.

    Args:
        main: the tool.
        define: defines the tool's flags on the `FlagValues` it is given.
        doc: the tool's description for `--help`.
        default_config: config file, relative to the repository; None: the tool has no `--config`.
        commands: the words of which the tool takes exactly one.
        argv: program and arguments; None: `sys.argv`.

    Returns:
        The exit status, 0 where `main` returned.
    """
    argv = list(sys.argv if argv is None else argv)
    try:
        if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(argv):
            print(help_text(argv, define, doc, default_config, commands))
            return DONE
        main(parse(argv, define, default_config, commands))
    except Exit as e:
        return _error(e.status, e)
    except ConfigError as e:
        return _error(USER_ERROR, e)
    except KeyboardInterrupt:
        return _error(130, "interrupted")
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        traceback.print_exc()
        return CRASHED
    return DONE


def parse(
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    default_config: str | None = None,
    commands: Sequence[str] = (),
) -> Args:
    """The command line as `Args`.

    Raises:
        ConfigError: anything about it that is wrong.
    """
    values = flags.FlagValues()  # not absl's global ones, to which every imported library adds its own
    define(values)
    config = None
    fit_mesh = False
    path, argv = _take("config", argv)
    overridden = _overridden(argv)
    try:
        if default_config is not None:
            base, fit_mesh = _base(path, default_config, argv if "workdir" in values else [])
            config_dict = to_config_dict(base)
            config_flags.DEFINE_config_dict("config", config_dict, flag_values=values, sys_argv=argv)
        elif path is not None or overridden:
            raise ConfigError("--config: this command takes none")
        rest = values(argv)[1:]
        if default_config is not None:
            config = from_config_dict(values.config)
    except flags.Error as e:
        raise _named(e) from e
    command = None
    if commands:
        if rest[:1] == [] or rest[0] not in commands:
            got = f"got {rest[0]!r}" if rest else "none given"
            raise ConfigError(f"command: {got}; takes {' or '.join(commands)}")
        command = rest.pop(0)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
    if config is not None:
        validate(config)
    return Args(values, config, fit_mesh and not any(p.startswith("mesh.") for p in overridden), command)


def config_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments of a command line that say which config it means: --config or else --workdir, and the overrides."""
    path, others = _take("config", argv[1:])
    folder, others = _take("workdir", others)
    overrides, value_follows = [], False
    for argument in others:
        field = re.match(r"--?(no)?config\.", argument)
        if field or (value_follows and not argument.startswith("-")):
            overrides.append(argument)
        value_follows = bool(field) and "=" not in argument
    base = {"config": path} if path is not None else {"workdir": folder} if folder is not None else {}
    return [*(f"--{flag}={value}" for flag, value in base.items()), *overrides]


def load_config(path: str) -> Config:
    """What the `get_config()` of a config file returns, with the types checked.

    Raises:
        ConfigError: no such file, an error in it, or an unknown or mistyped field.
    """
    if not paths.named("--config", path).is_file():
        raise ConfigError(f"--config: got {path!r}, which is no file; takes a file like configs/tiny.py")
    if str(REPOSITORY) not in sys.path:
        sys.path.append(str(REPOSITORY))  # for `from configs import base`, wherever the file lies
    try:
        values = runpy.run_path(path)["get_config"]()
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


def workdir(path: str, exists: bool) -> Path:
    """A run's folder, absolute, checked but not made.

    Args:
        path: as given on the command line.
        exists: it must be there already.

    Raises:
        ConfigError: it is missing though it must exist, or could not be made or written to.
    """
    if not path:
        raise ConfigError("--workdir: got '', which is no folder; takes a folder")
    folder = paths.named("--workdir", path).resolve()
    if exists and not folder.is_dir():
        raise ConfigError(f"--workdir: got {path}, which does not exist; takes the folder of a run")
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"--workdir: got {path}, but {parent} is not a folder to write to; takes a folder")
    return folder


def help_text(
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    doc: str,
    default_config: str | None = None,
    commands: Sequence[str] = (),
) -> str:
    """The tool's flags and, where it takes a config, every field with its value in the one that `argv` names."""
    values = flags.FlagValues()
    define(values)
    words = f" {{{','.join(commands)}}}" if commands else ""
    lines = [doc.strip(), "", f"usage: {Path(argv[0]).name}{words} [--flag=value ...]", ""]
    if default_config is not None:
        own = "the run's own in --workdir, else " if "workdir" in values else ""
        lines += _entry("--config=FILE", f"config file (default {own}{default_config})")
        lines += _entry("--config.SECTION.FIELD=VALUE", "any field listed below")
    for name in sorted(values):
        flag = values[name]
        choices = getattr(flag.parser, "enum_values", None)
        value = "|".join(choices) if choices else "true|false" if flag.boolean else "VALUE"
        text = re.sub(r"^<.*?>: ", "", flag.help)  # absl's list of choices
        lines += _entry(f"--{name}={value}", text if flag.default is None else f"{text} (default {flag.default})")
    if default_config is not None:
        path, others = _take("config", argv)
        config, _ = _base(path, default_config, others if "workdir" in values else [])
        lines += ["", f"config fields, with their values in {path or config.name}:"]
        for field in fields():
            value = attrgetter(field.path)(config)
            lines += _entry(f"--config.{field.path}={value}", field.comment)
    return "\n".join(lines)


def _entry(left: str, right: str) -> list[str]:
    """One flag of the help, its text in a column of its own."""
    text = textwrap.wrap(right, 66) or [""]
    first = [f"  {left:<44} {text[0]}"] if len(left) <= 44 else [f"  {left}", " " * 47 + text[0]]
    return [line.rstrip() for line in first + [" " * 47 + line for line in text[1:]]]


def _base(path: str | None, default: str, argv: Sequence[str]) -> tuple[Config, bool]:
    """The config that the flags change: --config's, else that of the run in --workdir, else the tool's default.

    Also returned: whether it is the default, whose mesh may follow the machine.
    """
    if path is not None:
        return load_config(path), False
    folder = _take("workdir", argv)[0]
    if folder and (paths.named("--workdir", folder) / "config.json").is_file():
        return read_config(paths.named("--workdir", folder))[0], False
    return load_config(str(REPOSITORY / default)), True


def _take(flag: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of a flag, and the other arguments: config_flags wants a config before absl reads the command line."""
    value, others = None, []
    arguments = iter(argv)
    for argument in arguments:
        if argument in (f"--{flag}", f"-{flag}"):
            value = next(arguments, "")
        elif argument.startswith((f"--{flag}=", f"-{flag}=")):
            value = argument.partition("=")[2]
        else:
            others.append(argument)
    return value, others


def _overridden(argv: Sequence[str]) -> list[str]:
    """The config fields among the flags, all of which exist."""
    known = {field.path for field in fields()}
    matches = (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv)
    paths = [match[1] for match in matches if match]
    for path in paths:
        if path not in known:
            raise unknown_field(path)
    return paths


def _named(error: flags.Error) -> ConfigError:
    """absl's complaint; where it is about a config field's type, in the words of maxsep/config/schema.py."""
    match = re.match(r"flag --config\.([^=]*)=(.*?): ", str(error))
    if match is None:
        return ConfigError(str(error))
    (field,) = (f for f in fields() if f.path == match[1])
    return mistyped(field.path, match[2], field.hint)


def _error(status: int, message: object) -> int:
    print("error:", *str(message).split(), file=sys.stderr, flush=True)  # one line, whatever the message
    return status
