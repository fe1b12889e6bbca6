"""Trains a Mixture-of-Experts transformer, or with --mode=eval evaluates its latest checkpoint.

Without flags: configs/tiny.py, on real text, on a mesh that fits the machine. The same command, or --workdir alone,
resumes a run that was stopped. Several processes can train one run: docs/multihost.md.
"""

from maxsep.parallel import huge_pages

if __name__ == "__main__":
    huge_pages.ensure()  # before what is slow to import

import sys
from contextlib import nullcontext

from absl import flags

from maxsep.cluster import join
from maxsep.config import cli, paths
from maxsep.output import workdir
from maxsep.output.lock import Lock
from maxsep.parallel.start import start
from maxsep.planning import auto


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of the run (default runs/NAME, the config's name)", flag_values=values)
    flags.DEFINE_enum(
        "mode", "train", ["train", "eval"], "train, or evaluate the latest checkpoint", flag_values=values
    )
    join.define(values)


def main(args: cli.Args) -> None:
    from maxsep.data import preparation  # imports NumPy, which would double the time that --help takes

    training = args.flags.mode == "train"
    named = args.flags.workdir
    folder = paths.run_folder(
        f"runs/{args.config.name}" if named is None else named, exists=not training, written=training
    )
    workdir.check_start(folder, args.config, training)
    auto.check(args.config, folder)
    workdir.check_tokenizer(folder, args.config, preparation.check(args.config))
    with join.joined(args, folder) as job, Lock(folder, job) if training else nullcontext() as lock:
        config, plan = auto.settled(args.config, folder, job)
        config = start(config, args.fit_mesh, training, job)
        from maxsep.training import trainer  # imports JAX, which must wait until the flags are right

        if training:
            trainer.train(config, folder, lock, job, plan)
        else:
            trainer.evaluate(config, folder, job)


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__, default_config="configs/tiny.py"))
