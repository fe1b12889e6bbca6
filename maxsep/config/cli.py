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

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from maxsep.config import paths, streams
from maxsep.config.faults import of_the_world
from maxsep.config.files import load_config
from maxsep.config.help import page
from maxsep.config.layouts import AUTO
from maxsep.config.paths import REPOSITORY
from maxsep.config.runs import SIZES
from maxsep.config.schema import (
    Config,
    ConfigError,
    MeshConfig,
    fields,
    from_config_dict,
    mistyped,
    to_config_dict,
    unknown_field,
)
from maxsep.config.stored import read_config
from maxsep.config.validate import validate

# Exit statuses. RESTART: of what other machines, disks and networks did, so that the same command may succeed another
# time. Anything that is nobody's mistake but a crash is CRASHED.
DONE, USER_ERROR, CRASHED, RESTART, NONFINITE, SAVE_FAILED, STOPPED = 0, 2, 70, 71, 72, 73, 75
UNREAD = 141  # as a shell tells of SIGPIPE


class Exit(Exception):
    """Ends the program with a status other than 0 and one line that says why; "" where that has been said."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Args:
    """A parsed command line."""

    flags: flags.FlagValues  # the tool's own, as attributes
    config: Config | None  # checked; None for a tool that takes none
    fit_mesh: bool  # the mesh may follow the machine: no field of it was named, nor, for training, a config or a run
    command: str | None  # train in `bench train`; None for a tool without commands
    argv: list[str]  # program and arguments, those in flag files among them


@dataclass(frozen=True)
class Found:
    """A tool whose config is no file's: that of the run it works on, as `config_of_run` finds it, or of a model."""

    config: Callable[[list[str]], tuple[Config, list[str]]]  # of these arguments, to which a folder may be added
    takes: tuple[str, ...]  # the config fields that may be set


def run(
    main: Callable[[Args], None],
    define: Callable[[flags.FlagValues], None],
    doc: str,
    default_config: str | None = None,
    commands: Sequence[str] = (),
    argv: Sequence[str] | None = None,
    found: Found | None = None,
    any_mesh: bool = False,
    prepared: Callable[[list[str]], list[str]] = list,
) -> int:
    """Parses the command line, calls `main`, and turns whatever happens into an exit status.

    Args:
        main: the tool.
        define: defines the tool's flags on the `FlagValues` it is given.
        doc: the tool's description for `--help`.
        default_config: config file, relative to the repository; None: the tool has no `--config`.
        commands: the words of which the tool takes exactly one.
        argv: program and arguments; None: `sys.argv`.
        found: where the tool's config is found, instead of `default_config`.
        any_mesh: the tool replaces the config's layout and mesh, which are not checked.
        prepared: what the tool makes of program and arguments before they are parsed.

    Returns:
        The exit status, 0 where `main` returned.
    """
    streams.ready()
    try:
        if argv is None:
            argv = sys.argv = expanded(sys.argv)
        argv = prepared(expanded(argv))
        if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(argv):
            print(help_text(argv, define, doc, default_config, commands, found))
        else:
            main(parse(argv, define, default_config, commands, found, any_mesh))
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as e:
        return answer(e)
    return DONE


def expanded(argv: Sequence[str]) -> list[str]:
    """Program and arguments, with those in the file that a --flagfile names in its place.

    Raises:
        ConfigError: there is no such file.
    """
    try:
        return [*argv[:1], *flags.FlagValues().read_flags_from_files(list(argv[1:]))]
    except flags.Error as e:
        raise ConfigError(f"--flagfile: {e}; takes a file of flags, one per line") from e


def answer(error: BaseException) -> int:
    """Tells the user what has ended the program; the exit status."""
    lost = streams.lost() if isinstance(error, OSError) else None
    if isinstance(lost, BrokenPipeError):  # the reader has seen enough, as `head` has
        return UNREAD
    if lost is not None:
        error = Exit(SAVE_FAILED, f"standard output: {lost.strerror}")
    status, message = outcome(error)
    if status == CRASHED and not isinstance(error, Exit):
        traceback.print_exception(error)
    elif message:
        print("error:", message, file=sys.stderr, flush=True)
    return status


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit status and one line, whatever the error's message."""
    text = " ".join(str(error).split())
    match error:
        case ConfigError() | OSError() if of_the_world(error):
            return RESTART, text
        case Exit():
            return RESTART if error.status == SAVE_FAILED and of_the_world(error) else error.status, text
        case ConfigError():
            return USER_ERROR, text
        case KeyboardInterrupt():
            return 130, "interrupted"
    return CRASHED, f"{type(error).__name__}: {text}"


def parse(
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    default_config: str | None = None,
    commands: Sequence[str] = (),
    found: Found | None = None,
    any_mesh: bool = False,
) -> Args:
    """The command line as `Args`.

    Raises:
        ConfigError: anything about it that is wrong.
    """
    values = flags.FlagValues()  # not absl's global ones, to which every imported library adds its own
    define(values)
    config, given = None, argv
    fit_mesh = False
    path, argv = take("config", argv)
    overridden = _overridden(argv)
    takes_config = default_config is not None or found is not None
    try:
        if found is not None:
            base, argv, fit_mesh = *_found(path, argv, overridden, found), True
        elif default_config is not None:
            base, fit_mesh = _base(path, default_config, argv, "workdir" in values)
        if takes_config:
            config_dict = to_config_dict(base)
            config_flags.DEFINE_config_dict("config", config_dict, flag_values=values, sys_argv=argv)
        elif path is not None or overridden:
            raise ConfigError("--config: this command takes none")
        rest = values(argv)[1:]
        if takes_config:
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
        validate(config, training=found is None, mesh=not any_mesh)
    if config is not None and config.layout == AUTO:
        for path in overridden:
            if path in SIZES:
                raise ConfigError(f"{path}: is chosen by layout=auto; takes no flag beside it")
        fit_mesh = False
    elif "cluster" in overridden and not any_mesh:
        raise ConfigError(
            f"cluster: got {config.cluster} beside layout={config.layout}; takes layout=auto, which plans"
        )
    fit_mesh = fit_mesh and not any(path.startswith("mesh.") for path in overridden)
    return Args(values, config, fit_mesh, command, list(given))


def config_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments of a command line that say which config it means: --config or else --workdir, and the overrides."""
    path, others = take("config", argv[1:])
    folder, others = take("workdir", others)
    overrides, value_follows = [], False
    for argument in others:
        field = re.match(r"--?(no)?config\.", argument)
        if field or (value_follows and not argument.startswith("-")):
            overrides.append(argument)
        value_follows = bool(field) and "=" not in argument
    base = {"config": path} if path is not None else {"workdir": folder} if folder is not None else {}
    return [*(f"--{flag}={value}" for flag, value in base.items()), *overrides]


def help_text(
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    doc: str,
    default_config: str | None = None,
    commands: Sequence[str] = (),
    found: Found | None = None,
) -> str:
    """The tool's flags and, where it takes a config, every field with its value in the one that `argv` names."""
    values = flags.FlagValues()
    define(values)
    general, heading, shown = [], "", []
    if default_config is not None:
        own = "the run's own in --workdir, else " if "workdir" in values else ""
        general += [("--config=FILE", f"config file (default {own}{default_config})")]
        path, others = take("config", argv)
        config, _ = _base(path, default_config, others, "workdir" in values)
        heading = f"config fields, with their values in {path or config.name}:"
        shown = [(f"--config.{field.path}={attrgetter(field.path)(config)}", field.comment) for field in fields()]
    elif found is not None:
        heading = "config fields that may differ from the run's own:"
        shown = [(f"--config.{field.path}=VALUE", field.comment) for field in fields() if field.path in found.takes]
    general += [("--flagfile=FILE", "file of more flags, one per line")]
    if heading:
        general += [("--config.SECTION.FIELD=VALUE", "any field listed below")]
    words = f" {{{','.join(commands)}}}" if commands else ""
    return page(doc, f"{Path(argv[0]).name}{words}", general, values, heading, shown)


def _base(path: str | None, default: str, argv: Sequence[str], has_workdir: bool) -> tuple[Config, bool]:
    """The config that the flags change: --config's, else that of the run in --workdir, else the tool's default.

    The default has the model and the tokenizer of the run that train.init_from names. Also returned: whether it is the
    default, whose mesh may follow the machine.
    """
    if path is not None:
        return load_config(path), False
    folder = take("workdir", argv)[0] if has_workdir else None
    if folder and (paths.named("--workdir", folder) / "config.json").is_file():
        return read_config(paths.named("--workdir", folder))[0], False
    config = load_config(str(REPOSITORY / default))
    source = take("config.train.init_from", argv)[0]
    run = paths.named("train.init_from", source or "").resolve()
    if not source or not (run / "config.json").is_file():  # what it has instead is told where it is read
        return config, True
    stored = read_config(run)[0]
    data = replace(config.data, tokenizer=stored.data.tokenizer)
    # On one device, where the mesh does not follow the machine: the default's may not divide this model.
    return replace(config, name=f"from_{run.name}", mesh=MeshConfig(), model=stored.model, data=data), True


def _found(path: str | None, argv: Sequence[str], overridden: list[str], found: Found) -> tuple[Config, list[str]]:
    """The tool's config, on one device if the flags name no mesh, and the arguments."""
    if path is not None:
        raise ConfigError(f"--config: got {path}; takes none, as what this command works on has its own")
    for field in overridden:
        if field not in found.takes:
            raise ConfigError(f"{field}: is the run's own and cannot be changed here; takes {', '.join(found.takes)}")
    config, argv = found.config(list(argv))
    if not any(field.startswith("mesh.") for field in overridden):
        config = replace(config, mesh=MeshConfig())
    return config, argv


def config_of_run(argv: list[str], newest: Callable[[], Path] | None = None) -> tuple[Config, list[str]]:
    """The config of the run that --workdir names, else of the `newest`, which is added to the arguments.

    Raises:
        ConfigError: there is no such run.
    """
    folder = take("workdir", argv)[0]
    if folder is None and newest is not None:
        folder = str(newest())
        argv = [*argv[:1], f"--workdir={folder}", *argv[1:]]
    return read_config(paths.run_folder(folder, exists=True, written=False))[0], argv


def integers(flag: str, values: Sequence[str]) -> list[int]:
    """The value of a flag that takes a list of integers from 1 up.

    Raises:
        ConfigError: it is another one, or empty.
    """
    if not values or not all(value.isdecimal() and 0 < int(value) < 2**31 for value in values):
        raise ConfigError(f"--{flag}: got {','.join(values)}; takes integers from 1 up, as 512,1024")
    return [int(value) for value in values]


def take(flag: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
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
