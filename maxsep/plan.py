"""Plans a training run for machines one does not have: what fits them, how fast it would be, and what limits it.

    python -m maxsep.plan --config=configs/seed.py --cluster=a100-80gb:4x4
    python -m maxsep.plan --config=configs/small.py --cluster=h100:1x8 --runs=ma:1x8,ma:2x4 --json=plan.json

For every layout and every mesh that divides the model and the batch, or those of --runs, XLA compiles the real train
step for the cluster, without any of its devices. Memory, FLOPs and communication are the compiled program's. Times are
a roofline of it, and a range: nothing runs.

A cluster is NAME:NODESxDEVICES, the devices of a node: a100-80gb, h100, h200, b200, cpu (simulated devices of this
machine), or a file like configs/clusters/h100.py. GPUs take the extra cuda. What has been compiled is kept: the same
command resumes where it was stopped, and answers at once when all is there.
"""

import dataclasses
import shlex
import sys
from pathlib import Path

from absl import flags

from maxsep.cluster import process
from maxsep.config import Config, ConfigError, cli, paths, runs
from maxsep.config.cluster import load_cluster
from maxsep.config.validate import tokenizer_ids

DEFAULT = "configs/seed.py"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "cluster", None, "cluster to plan for: NAME:NODESxDEVICES, as a100-80gb:4x4", flag_values=values
    )
    flags.DEFINE_list("runs", None, "only these layouts and meshes, as ma:4x4,pp:2x1x8", flag_values=values)
    flags.DEFINE_string("json", None, "file to write the plan to", flag_values=values)
    flags.DEFINE_string("picture", None, "PNG file to draw time and memory of each layout to", flag_values=values)
    flags.DEFINE_string("cache", None, "folder of compiled results (default in the user's cache)", flag_values=values)
    flags.DEFINE_integer(
        "jobs", None, "programs to compile at a time (default half of the cores)", lower_bound=1, flag_values=values
    )


def main(args: cli.Args) -> None:
    from maxsep.measure import plots
    from maxsep.output.durable import json_text, write_asked
    from maxsep.parallel.start import cores
    from maxsep.planning import candidates, picture, rows, session, simulated, table, target
    from maxsep.planning.kept import Kept

    process.refuse_several("plan")
    options, config = args.flags, args.config
    if options.cluster is None:
        raise ConfigError("--cluster: none given; takes what to plan for, as a100-80gb:4x4 (4 nodes of 4 devices)")
    cluster = load_cluster(options.cluster)
    if options.json:
        paths.to_write("--json", options.json)
    if options.picture:
        plots.check("--picture", options.picture)
    shared = cli.config_arguments(args.argv)
    runs.check_free(shared)
    if options.runs is None:
        configs = candidates.every(config, cluster.devices)
    else:
        configs = candidates.asked(options.runs, config, cluster.devices)
    versions = target.cuda_versions() if cluster.gpu else {}
    store = Kept(_cache(options.cache))
    jobs = options.jobs or max(1, cores() // 2)
    found = session.compile_all(configs, _ids(config), cluster, versions, store, jobs, _say)

    cluster = cluster if cluster.gpu else simulated.measured(cluster, config.model.dtype)
    made = rows.of(configs, found, cluster)
    best, reason = rows.best(made)
    device = cluster.gpu.name if cluster.gpu else "simulated CPU device"
    shape = f"{cluster.nodes} nodes of {cluster.devices_per_node}" if cluster.nodes > 1 else "one node"
    title = f"{config.name} on {options.cluster}: {cluster.devices} x {device}, {shape}"
    print(f"{title}\n")
    print("\n".join([*table.text(made, best, cluster), "", reason]))
    if best:
        print(f"train it: {shlex.join(['python', 'train.py', *shared, *best.flags])}")
    if options.json:
        plan = {"config": config.name, "cluster": options.cluster, "layouts": [dataclasses.asdict(row) for row in made]}
        plan |= {"best": best and best.name, "reason": reason, "source": rows.SOURCE}
        write_asked("--json", options.json, json_text(plan))
    if options.picture and not all(row.error for row in made):
        picture.draw(made, title, cluster, plots.check("--picture", options.picture))
    if all(row.error for row in made):
        raise cli.Exit(cli.CRASHED, f"no layout compiled; the first: {made[0].error}")


def _ids(config: Config) -> int | None:
    """Number of the tokenizer's ids; None where only a file could tell, and it is not here."""
    from maxsep.data import tokenizer

    name = config.data.tokenizer
    if (ids := tokenizer_ids(name)) is not None or not paths.named("data.tokenizer", name).is_file():
        return ids
    return tokenizer.of(config).vocab_size


def _cache(named: str | None) -> Path:
    if named is not None:
        return paths.named("--cache", named)
    folder = paths.user_cache()
    if folder is None:
        raise ConfigError("--cache: none given, and this user has no home; takes a folder to keep what is compiled in")
    return folder / "plans"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(argv: list[str] | None = None) -> int:
    return cli.run(main, define, __doc__, default_config=DEFAULT, argv=argv, any_mesh=True)


if __name__ == "__main__":
    sys.exit(run())
