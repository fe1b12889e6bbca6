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
import tempfile
from pathlib import Path

from absl import flags

from maxsep.cluster import process
from maxsep.config import ConfigError, cli, paths, runs
from maxsep.config.cluster import Cluster, load_cluster

DEFAULT = "configs/seed.py"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "cluster", None, "cluster to plan for: NAME:NODESxDEVICES, as a100-80gb:4x4", flag_values=values
    )
    flags.DEFINE_list("runs", None, "only these layouts and meshes, as ma:4x4,pp:2x1x8", flag_values=values)
    flags.DEFINE_string("json", None, "file to write the plan to", flag_values=values)
    flags.DEFINE_string("picture", None, "PNG file to draw time and memory of each layout to", flag_values=values)
    flags.DEFINE_string("cache", None, "folder of compiled results (default in the user's cache)", flag_values=values)
    flags.DEFINE_string(
        "measure", None, "cluster file to write, with what this machine's devices reach", flag_values=values
    )
    flags.DEFINE_string(
        "table", None, "measure: Markdown file to add planned beside measured to, as docs/plan.md", flag_values=values
    )
    flags.DEFINE_integer(
        "jobs", None, "programs to compile at a time (default half of the cores)", lower_bound=1, flag_values=values
    )


def main(args: cli.Args) -> None:
    from maxsep.measure import plots
    from maxsep.output.durable import json_text, write_asked
    from maxsep.planning import calibration, candidates, kept, picture, planned, table

    process.refuse_several("plan")
    options, config = args.flags, args.config
    named = options.cluster or config.cluster
    if named is None:
        raise ConfigError("--cluster: none given; takes what to plan for, as a100-80gb:4x4 (4 nodes of 4 devices)")
    cluster = load_cluster(named)
    if options.json:
        paths.to_write("--json", options.json)
    if options.picture:
        plots.check("--picture", options.picture)
    if options.measure:
        paths.to_write("--measure", options.measure)
    if options.measure and (cluster.nodes > 1 or not options.measure.endswith(".py")):
        got = f"got {options.measure} for {cluster.nodes} nodes"
        raise ConfigError(f"--measure: {got}; takes a file that ends in .py, and a cluster of one node: this machine")
    if options.table and not options.measure:
        raise ConfigError("--table: got without --measure, which makes its lines")
    shared = cli.config_arguments(args.argv)
    runs.check_free(shared)
    if options.runs is None:
        configs = candidates.every(config, cluster.devices)
    else:
        configs = candidates.asked(options.runs, config, cluster.devices)
    cache = kept.folder(options.cache)
    with tempfile.TemporaryDirectory() as scratch:
        if options.measure:
            _say(f"measuring {cluster.devices} devices")
            cluster = calibration.rated(config, cluster, Path(scratch))
        plan = planned.plan(config, named, cluster, configs, cache, options.jobs, _say)
        if options.measure:
            plan = _measured(plan, cluster, shared, options, Path(scratch))

    best = plan.best
    print(f"{plan.title}\n")
    print("\n".join([*table.text(plan.rows, best, plan.cluster), "", plan.reason]))
    if best:
        print(f"train it: {shlex.join(['python', 'train.py', *shared, *best.flags])}")
    if options.json:
        write_asked("--json", options.json, json_text(plan.to_json()))
    if all(row.error for row in plan.rows):
        raise cli.Exit(cli.CRASHED, f"no layout compiled; the first: {plan.rows[0].error}")
    if options.picture:
        picture.draw(plan.rows, plan.title, plan.cluster, plots.check("--picture", options.picture))


def _measured(plan, cluster: Cluster, shared: list[str], options: flags.FlagValues, folder: Path):
    """Trains the rows, writes what --measure and --table ask for, and returns the plan at the rates that they reach."""
    from maxsep.output.durable import write_asked
    from maxsep.planning import calibration, comparison

    measured = comparison.measure(plan, shared, folder, _say)
    programs, seconds = [plan.program(one.row) for one in measured], [one.seconds for one in measured]
    fitted = calibration.fitted(programs, seconds, plan.cluster)
    again = dataclasses.replace(plan, cluster=fitted)
    print("\n".join(["planned beside measured", *comparison.text(measured, again), ""]))
    device = "simulated devices of a CPU" if cluster.gpu is None else cluster.gpu.name
    said = f"Measured on {len(measured)} layouts of {plan.config.name}, {cluster.devices} {device}, by plan --measure."
    # What this machine has left of its memory is another time's.
    written = dataclasses.replace(fitted, memory_bytes=cluster.memory_bytes)
    write_asked("--measure", options.measure, calibration.source(written, said))
    if options.table:
        comparison.append(paths.to_write("--table", options.table), measured, plan)
    return again


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(argv: list[str] | None = None) -> int:
    return cli.run(main, define, __doc__, default_config=DEFAULT, argv=argv, any_mesh=True)


if __name__ == "__main__":
    sys.exit(run())
