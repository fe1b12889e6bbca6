"""Plans a training run for machines one does not have: what fits them, how fast it would be, and what limits it.

    python -m maxsep.plan --config=configs/seed.py --cluster=a100-80gb:4x4
    python -m maxsep.plan --config=configs/small.py --cluster=h100:1x8 --runs=ma:1x8,ma:2x4 --json=plan.json

For every layout and every mesh that divides the model and the batch, or those of --runs, XLA compiles the real train
step for the cluster, without any of its devices; with --mode=decode, prefill and decoding. Memory, FLOPs and
communication are the compiled program's. Times are a roofline of it, and a range: nothing runs. With --measure this
machine's devices are measured first, and its layouts beside the plan.

A cluster is NAME:NODESxDEVICES, the devices of a node: a100-80gb, h100, h200, b200, tpu-v5e, tpu-v5p, tpu-v6e, cpu
(simulated devices of this machine), or a file like configs/clusters/h100.py. GPUs take the extra cuda, TPUs the extra
tpu. What has been compiled is kept: the same command resumes where it was stopped, and answers at once when all is
there.
"""

import dataclasses
import itertools
import shlex
import sys
import tempfile
from pathlib import Path

from absl import flags

from maxsep.cluster import process
from maxsep.config import Config, ConfigError, cli, paths, runs
from maxsep.config.cluster import Cluster, load_cluster

DEFAULT = "configs/seed.py"
# The flags of one mode alone.
OF_ONE_MODE = dict.fromkeys(("contexts", "batches", "new"), "decode") | dict.fromkeys(
    ("measure", "table", "picture"), "train"
)


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "cluster", None, "cluster to plan for: NAME:NODESxDEVICES, as a100-80gb:4x4", flag_values=values
    )
    flags.DEFINE_enum("mode", "train", ["train", "decode"], "plan the train step, or inference", flag_values=values)
    flags.DEFINE_list("contexts", "512,1024,2048,4096", "decode: prompt lengths, in tokens", flag_values=values)
    flags.DEFINE_list("batches", "1,16", "decode: batch sizes", flag_values=values)
    flags.DEFINE_integer("new", 64, "decode: new tokens per prompt", lower_bound=1, flag_values=values)
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
    from maxsep.planning import candidates

    process.refuse_several("plan")
    options, config = args.flags, args.config
    named = options.cluster or config.cluster
    if named is None:
        raise ConfigError("--cluster: none given; takes what to plan for, as a100-80gb:4x4 (4 nodes of 4 devices)")
    cluster = load_cluster(named)
    check(options, cluster)
    shared, training = cli.config_arguments(args.argv), options.mode == "train"
    runs.check_free(shared)
    if options.runs is None:
        configs = candidates.every(config, cluster.devices, training=training)
    else:
        configs = candidates.asked(options.runs, config, cluster.devices, training)
    if training:
        train(options, config, named, cluster, configs, shared)
    else:
        decode(options, config, named, cluster, configs)


def check(options: flags.FlagValues, cluster: Cluster) -> None:
    """The rules of the flags that absl cannot hold.

    Raises:
        ConfigError: one is broken.
    """
    from maxsep.measure import plots

    for flag, mode in OF_ONE_MODE.items():
        if options[flag].present and options.mode != mode:
            raise ConfigError(f"--{flag}: got beside --mode={options.mode}; takes --mode={mode}")
    for flag in ("contexts", "batches"):
        cli.integers(flag, options[flag].value)
    if options.json:
        paths.to_write("--json", options.json)
    if options.picture:
        plots.check("--picture", options.picture)
    if options.measure:
        paths.to_write("--measure", options.measure)
        if cluster.nodes > 1 or cluster.tpu or not options.measure.endswith(".py"):
            got = f"got {options.measure} for {cluster.nodes} x {cluster.devices_per_node} {cluster.device}"
            takes = "a file that ends in .py, and one node of GPUs or of simulated devices: this machine"
            raise ConfigError(f"--measure: {got}; takes {takes}")
    elif options.table:
        raise ConfigError("--table: got without --measure, which makes its lines")


def train(options, config: Config, named: str, cluster: Cluster, configs: list[Config], shared: list[str]) -> None:
    """Plans the train step; with --measure, beside what this machine measures."""
    from maxsep.measure import plots
    from maxsep.output.durable import json_text, write_asked
    from maxsep.planning import calibration, candidates, kept, picture, planned, table

    cache = kept.folder(options.cache)
    with tempfile.TemporaryDirectory() as scratch:
        if options.measure:
            _say(f"measuring {cluster.devices} devices")
            cluster = calibration.rated(config, cluster, Path(scratch))
        plan = planned.plan(config, named, cluster, configs, cache, options.jobs, _say)
        if options.measure:
            plan = _measured(plan, cluster, shared, options, Path(scratch))
    print(f"{plan.title}\n")
    limits = [] if options.runs else candidates.limits(config, cluster.devices)
    print("\n".join([*table.text(plan.rows, plan.best, plan.cluster), "", *limits, plan.reason]))
    if plan.best:
        print(f"train it: {shlex.join(['python', 'train.py', *shared, *plan.best.flags])}")
    if options.json:
        write_asked("--json", options.json, json_text(plan.to_json()))
    if all(row.error for row in plan.rows):
        raise cli.Exit(cli.CRASHED, f"no layout compiled; the first: {plan.rows[0].error}")
    if options.picture:
        picture.draw(plan.rows, plan.title, plan.cluster, plots.check("--picture", options.picture))


def decode(options, config: Config, named: str, cluster: Cluster, configs: list[Config]) -> None:
    """Plans prefill and decoding, of every batch size and context."""
    from maxsep.output.durable import json_text, write_asked
    from maxsep.planning import decoding, kept, planned

    sizes = list(itertools.product(*(cli.integers(flag, options[flag].value) for flag in ("batches", "contexts"))))
    found, cluster = decoding.plan(configs, cluster, sizes, options.new, kept.folder(options.cache), options.jobs, _say)
    print(f"{planned.title(config, named, cluster)}, {options.new} new tokens per prompt\n")
    print("\n".join(decoding.text(found, cluster)))
    if options.json:
        rows = [dataclasses.asdict(row) for row in found]
        write_asked("--json", options.json, json_text({"config": config.name, "cluster": named, "layouts": rows}))
    if all(row.error for row in found):
        raise cli.Exit(cli.CRASHED, f"no layout compiled; the first: {found[0].error}")


def _measured(plan, cluster: Cluster, shared: list[str], options: flags.FlagValues, folder: Path):
    """Trains the rows, writes what --measure and --table ask for, and returns the plan at the rates that they reach."""
    from maxsep.output.durable import write_asked
    from maxsep.planning import calibration, comparison

    measured = comparison.measure(plan, shared, folder, _say)
    programs, seconds = [plan.program(one.row) for one in measured], [one.seconds for one in measured]
    fitted = calibration.fitted(programs, seconds, plan.cluster)
    again = dataclasses.replace(plan, cluster=fitted)
    print("\n".join(["planned beside measured", *comparison.text(measured, again), ""]))
    on = f"{len(measured)} layouts of {plan.config.name}, {cluster.devices} x {cluster.device}"
    said = f"Measured on {on}, by plan --measure."
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
