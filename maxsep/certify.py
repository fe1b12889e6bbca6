"""Proves that layouts compute what one device computes, and that this machine's devices do.

    python -m maxsep.certify --config=configs/seed.py
    python -m maxsep.certify --config=configs/tiny.py --runs=ma:4x4,tp:8x2 --folder=certificate

The model that is certified is built by the classes that train it. It is the config's, as small as the meshes allow;
every field that was changed is listed. Layouts and checkpoints that move are certified in float64 on simulated devices
of the CPU; the run's own type, kernels, collectives and repeats on this machine's devices. Without --runs each layout
is certified on a mesh of as many devices as the config's. Writes certificate.md and certificate.json; ends with status
1 if a check fails. Several processes may make one certificate, as they train one run: docs/multihost.md. With --plant a
fault is planted first, and the certificate must fail; nothing is written.
"""

import os
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from absl import flags

from maxsep.certification import parts
from maxsep.certification.certificate import FAILED, Certificate
from maxsep.certification.parts import EXACT, HERE, PARTS, Found
from maxsep.certification.scaled import scaled
from maxsep.cluster import child, join, process
from maxsep.cluster.signals import Stop
from maxsep.config import Config, ConfigError, cli, paths, runs
from maxsep.config.layouts import LAYOUTS
from maxsep.planning import candidates

DEFAULT = "configs/tiny.py"
DEVICES = 8  # where the config has a mesh of one


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_list("runs", None, "layouts and meshes to certify, as ma:4x4,pp:2x1x8", flag_values=values)
    flags.DEFINE_list("parts", None, f"what to certify, of {','.join(PARTS)} (default: all)", flag_values=values)
    flags.DEFINE_string("plant", None, "only show that a planted fault is seen: its name, or all", flag_values=values)
    flags.DEFINE_string("folder", "certificate", "folder to write the certificate to", flag_values=values)
    flags.DEFINE_bool("print", True, "print the certificate", flag_values=values)
    join.define(values)


def main(args: cli.Args) -> None:
    options, config = args.flags, args.config
    runs.check_free(cli.config_arguments(args.argv))
    asked_for = list(PARTS) if options.parts is None else options.parts
    if not asked_for or not set(asked_for) <= PARTS.keys():
        raise ConfigError(f"--parts: got {','.join(asked_for)}; takes some of {','.join(PARTS)}")
    if options.plant is not None:
        if options.runs is not None:
            raise ConfigError("--plant: got beside --runs; takes one of the two: each fault has its layout")
        process.refuse_several("certify --plant")
        _plant(config, options.plant)
        return
    this, folder = process.this(options), paths.named("--folder", options.folder)
    devices = config.mesh.devices if config.mesh.devices > 1 else DEVICES
    asked = candidates.one_of_each(config, devices) if options.runs is None else candidates.asked(options.runs, config)
    if this.count > 1 and len({one.mesh.devices for one in asked}) > 1:
        takes = f"runs of as many devices each, as {this.count} processes use all of theirs"
        raise ConfigError(f"--runs: got {','.join(options.runs)}; takes {takes}")
    small = scaled(config, asked)
    _make(folder)
    halves = [[part for part in half if part in asked_for] for half in (EXACT, HERE)]
    if all(halves):
        found = _by_children(args, halves, folder, this.index == 0)
        if found is not None:
            _end(_certificate(args, asked, small, found), folder, options.print)
        return
    with join.joined(args, None) as job:
        configs = [replace(small, layout=one.layout, mesh=one.mesh) for one in asked]
        say = _say if job.first else lambda text: None
        if halves[0]:
            found = parts.exact(configs, halves[0], folder, say, job)
        else:
            found = parts.here(config, configs, halves[1], say, job)
        _end(_certificate(args, asked, small, found), folder if job.first else None, options.print)


def _plant(config: Config, name: str) -> None:
    """Raises cli.Exit where a planted fault is not seen."""
    parts.simulate()
    from maxsep.certification import planting

    if missed := planting.missed(config, name, _say):
        raise cli.Exit(FAILED, f"not seen: {', '.join(missed)}")


def _make(folder: Path) -> None:
    """Makes the folder, so that one that cannot be written is known before the work.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ConfigError(f"--folder: got {folder}, which cannot be written ({e.strerror}); takes a folder") from e


def _by_children(args: cli.Args, halves: list[list[str]], folder: Path, first: bool) -> Found | None:
    """What a process for each half of the parts finds; None in all processes of a job but the first.

    Raises:
        cli.Exit: one has not come to its end, or, in another process than the first, a check has failed.
    """
    found, statuses = Found([], [], [], {}), []
    for number, half in enumerate(halves):
        part = folder / f"part-{number}"
        own = [f"--parts={','.join(half)}", f"--folder={part}", "--noprint"]
        with Stop() as stop:
            statuses.append(child.run(["-m", "maxsep.certify", *args.argv[1:], *own], None, dict(os.environ), stop))
        if stop.asked:
            raise cli.Exit(cli.STOPPED, f"{stop.asked}: stopped while certifying; the same command begins again")
        if statuses[-1] not in (cli.DONE, FAILED):
            killed = f"a process was killed by {signal.Signals(-statuses[-1]).name}" if statuses[-1] < 0 else ""
            raise cli.Exit(child.shell_status(statuses[-1]), killed)
        if first:
            found += Certificate.read(part)
            shutil.rmtree(part)
    if first:
        return found
    if FAILED in statuses:
        raise cli.Exit(FAILED, "")
    return None


def _certificate(args: cli.Args, asked: list[Config], small: Config, found: Found) -> Certificate:
    """With the layouts that no mesh of as many devices allows."""
    without = [] if args.flags.runs else [name for name in LAYOUTS if name not in {one.layout for one in asked}]
    devices = asked[0].mesh.devices
    left = [f"layout {name}: the config allows it on no mesh of {devices} devices" for name in without]
    # Of two halves each says so.
    return Certificate(args.config, small, found._replace(left=list(dict.fromkeys([*left, *found.left]))))


def _end(made: Certificate, folder: Path | None, shown: bool) -> None:
    """Prints and writes the certificate; without a folder another process of the job does.

    Raises:
        cli.Exit: it says that a check has failed, or it cannot be written.
    """
    if shown:
        print("\n".join(made.text()))
    if folder is not None:
        try:
            made.write(folder)
        except OSError as e:
            raise cli.Exit(cli.SAVE_FAILED, f"--folder: cannot write in {folder}: {e.strerror}") from e
        if shown:
            print(f"written: {paths.shown(folder)}: certificate.md, certificate.json")
    if not made.passed:
        raise cli.Exit(FAILED, f"not passed: {made.worst}" if shown else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(argv: list[str] | None = None) -> int:
    return cli.run(main, define, __doc__, default_config=DEFAULT, argv=argv, any_mesh=True)


if __name__ == "__main__":
    sys.exit(run())
