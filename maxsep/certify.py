"""Proves on this machine that layouts compute what one device computes: losses, gradients, states, decoding.

    python -m maxsep.certify --config=configs/seed.py
    python -m maxsep.certify --config=configs/tiny.py --runs=ma:4x4,tp:8x2 --folder=certificate

The model that is certified is built by the classes that train it. It is the config's, as small as the meshes allow, in
float64, on simulated devices of the CPU; every field that was changed is listed. Without --runs each layout is
certified on a mesh of as many devices as the config's. Writes certificate.md and certificate.json; ends with status 1
if a check fails. With --plant a fault is planted first, and the certificate must fail; nothing is written.
"""

import os
import sys
from dataclasses import replace

from absl import flags

from maxsep.cluster import process
from maxsep.config import ConfigError, cli, paths, runs
from maxsep.config.layouts import LAYOUTS

DEFAULT = "configs/tiny.py"
DEVICES = 8  # where the config has a mesh of one


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_list("runs", None, "layouts and meshes to certify, as ma:4x4,pp:2x1x8", flag_values=values)
    flags.DEFINE_string("plant", None, "only show that a planted fault is seen: its name, or all", flag_values=values)
    flags.DEFINE_string("folder", "certificate", "folder to write the certificate to", flag_values=values)


def main(args: cli.Args) -> None:
    process.refuse_several("certify")
    options, config = args.flags, args.config
    runs.check_free(cli.config_arguments(args.argv))
    if options.plant is not None and options.runs is not None:
        raise ConfigError("--plant: got beside --runs; takes one of the two: each fault has its layout")
    folder = paths.named("--folder", options.folder)
    if not folder.parent.is_dir():
        raise ConfigError(f"--folder: got {options.folder}, and {folder.parent} is no folder; takes one in a folder")
    os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports JAX
    from maxsep.certification import certificate, planting, scaled
    from maxsep.planning import candidates

    if options.plant is not None:
        if missed := planting.missed(config, options.plant, _say):
            raise cli.Exit(certificate.FAILED, f"not seen: {', '.join(missed)}")
        return
    devices = config.mesh.devices if config.mesh.devices > 1 else DEVICES
    asked = candidates.one_of_each(config, devices) if options.runs is None else candidates.asked(options.runs, config)
    small = scaled.scaled(config, asked)
    checks = certificate.certified([replace(small, layout=one.layout, mesh=one.mesh) for one in asked], _say)
    without = [] if options.runs else [name for name in LAYOUTS if name not in {one.layout for one in asked}]
    left = tuple(f"layout {name}: the config allows it on no mesh of {devices} devices" for name in without)
    written = certificate.Certificate(config, small, checks, left)
    print("\n".join(written.text()))
    written.write(folder)
    print(f"written: {paths.shown(folder)}: certificate.md, certificate.json")
    if not written.passed:
        raise cli.Exit(certificate.FAILED, f"not passed: {written.worst}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(argv: list[str] | None = None) -> int:
    return cli.run(main, define, __doc__, default_config=DEFAULT, argv=argv, any_mesh=True)


if __name__ == "__main__":
    sys.exit(run())
