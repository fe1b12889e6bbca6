"""Trains a Mixture-of-Experts transformer, or with --mode=eval evaluates its latest checkpoint.

Without flags: configs/tiny.py, on real text, on a mesh that fits the machine. A run that was stopped goes on when
the same command is given again.
"""

import sys

from absl import flags

from maxsep import cli, launch


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of the run (default runs/NAME, the config's name)", flag_values=values)
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "what to do", flag_values=values)


def main(args: cli.Args) -> None:
    workdir = cli.workdir(args.flags.workdir or f"runs/{args.config.name}", exists=args.flags.mode == "eval")
    config = launch.start(args.config, args.fit_mesh)
    from maxsep import trainer  # imports JAX, which must wait until the flags are right

    if args.flags.mode == "train":
        trainer.train(config, workdir)
    else:
        trainer.evaluate(config, workdir)


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__, default_config="configs/tiny.py"))
