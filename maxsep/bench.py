"""Measures speed: `bench train` times the training step, `bench decode` the time to and between new tokens.

`bench growth` times the training step for more tokens, longer sequences and more experts, one after the other.

The training step is the program that train.py runs, on a batch of random ids that is used again. The peak is that of
square matrix products on the same devices, measured between the turns.

Decoding is what infer.py runs, greedy, on prompts of random ids, for every context and batch size. The floor is the
time to read the weights and the cache that a step needs, at the measured speed of memory. With --experts the ways are
timed in which a layer's experts can take the tokens of each batch size: the program chooses by the number of tokens.

With --peers other systems time the same, each in its own process, in turns, so that whatever else the machine does
slows all of them. Without them, `bench train` runs on several processes too.
"""

from maxsep.parallel import huge_pages

if __name__ == "__main__":
    huge_pages.ensure()  # before what is slow to import

import json
import sys
from contextlib import ExitStack

from absl import flags

from maxsep.cluster import join, process
from maxsep.cluster.job import Job
from maxsep.config import Config, ConfigError, cli, paths
from maxsep.measure import growth, peers, plots, report
from maxsep.measure.timing import measurement, timed
from maxsep.output.durable import write_asked
from maxsep.parallel.start import start

PRODUCTS = 3  # matrix products a turn
STEPS = ("steps", "warmup", "turn")
GROWING = tuple(f"grow_{series}" for series in growth.AXES)
TAKES = {  # the flags of each command that not all take
    "train": (*STEPS, "parts"),
    "decode": ("contexts", "batches", "new", "repeats", "experts", "plot"),
    "growth": (*STEPS, *GROWING, "plot"),
}
COMMANDS = tuple(TAKES)


def define(values: flags.FlagValues) -> None:
    def integer(name, default, text):
        flags.DEFINE_integer(name, default, text, lower_bound=1, flag_values=values)

    def integers(name, default, text):
        flags.DEFINE_list(name, default, text, flag_values=values)

    integer("steps", 20, "train, growth: timed steps")
    integer("warmup", 3, "train, growth: steps before the timed ones")
    integer("turn", 5, "train, growth: steps per turn, where systems are compared")
    integers("grow_tokens", "1,2,4,8,16", "growth: times the batch")
    integers("grow_sequence", "256,512,1024,2048,4096", "growth: lengths of sequences, with as many tokens per step")
    integers("grow_experts", "8,16,32,64,128", "growth: numbers of experts")
    integers("contexts", "512,1024,2048,4096", "decode: prompt lengths, in tokens")
    integers("batches", "1,16", "decode: batch sizes")
    integer("new", 64, "decode: new tokens per prompt")
    integer("repeats", 3, "decode: timed generations")
    flags.DEFINE_boolean("experts", False, "decode: also time the experts alone", flag_values=values)
    flags.DEFINE_string("plot", None, "decode, growth: PNG file to write", flag_values=values)
    flags.DEFINE_string(
        "peers",
        None,
        "compare with the systems in this folder, which benchmarks/peers/setup.sh makes",
        flag_values=values,
    )
    flags.DEFINE_boolean("parts", False, "train: also profile the parts of the step (on a CPU)", flag_values=values)
    flags.DEFINE_string("json", None, "JSON Lines file to write, an object per measurement", flag_values=values)
    join.define(values)


def main(args: cli.Args) -> None:
    options, takes = args.flags, TAKES[args.command]
    for flag in (flag for of_command in TAKES.values() for flag in of_command if flag not in takes):
        if options[flag].present:
            others = " or ".join(command for command, of_command in TAKES.items() if flag in of_command)
            raise ConfigError(f"--{flag}: got beside {args.command}; takes {others}")
    sizes = {flag: cli.integers(flag, options[flag].value) for flag in ("contexts", "batches", *GROWING)}
    if args.command == "growth":
        growth.points(args.config, _grown(sizes))
    names = []
    if options.peers:
        names = peers.installed(options.peers)
        peers.check(args.config)
    if options.json:
        paths.to_write("--json", options.json)
    if options.plot:
        plots.check("--plot", options.plot)
    alone = [
        what
        for what, asked in ((args.command, args.command != "train"), ("--peers", names), ("--parts", options.parts))
        if asked
    ]
    if alone and process.this(options).count > 1:
        raise ConfigError(f"--num_processes: got {process.this(options).count}; takes 1, as {alone[0]} is one process")
    with join.joined(args, None) as job:
        measure(args, names, sizes, job)


def _grown(sizes: dict[str, list[int]]) -> dict[str, list[int]]:
    """By series, those of the flags' `sizes` that a step grows through."""
    return {series: sizes[flag] for series, flag in zip(growth.AXES, GROWING, strict=True)}


def measure(args: cli.Args, names: list[str], sizes: dict[str, list[int]], job: Job) -> None:
    """Measures, prints, and writes what the flags ask for; the first process does for all."""
    options = args.flags
    config = start(args.config, fit_mesh=False, training=args.command != "decode", job=job)

    import jax

    from maxsep.parallel.mesh import make_mesh

    if (options.parts or names) and jax.default_backend() != "cpu":
        flag = "--peers" if names else "--parts"
        raise ConfigError(f"{flag}: got {jax.default_backend()} devices; takes the CPU's, as with JAX_PLATFORMS=cpu")
    with jax.set_mesh(make_mesh(config)):
        if args.command == "train":
            results = train(config, names, options)
            if job.count > 1:  # what they need cannot be told from what others need
                results = [result | {"other_cpu": None} for result in results]
            print(report.train(results), flush=True)
        elif args.command == "growth":
            found = growth.measured(growth.points(config, _grown(sizes)), lambda grown: train(grown, names, options))
            results = list(found)
            print(report.growth(results), flush=True)
        else:
            from maxsep.inference import speed

            shape = {name: size for name, size in facts(config)["shape"].items() if name not in ("sequence", "batch")}
            how = options.new, options.repeats, names, options.peers, say
            results = list(speed.sweep(config, shape, sizes["contexts"], sizes["batches"], *how))
            print(report.decode(results), flush=True)
    if options.experts:
        say("maxsep: the experts alone")
        of_experts = list(speed.forms(config.model, jax.default_backend(), sizes["batches"]))
        print(report.experts(of_experts), flush=True)
        results += of_experts
    if options.plot:
        draw = plots.growth if args.command == "growth" else plots.decoding
        draw(
            [result for result in results if "error" not in result and "task" in result],
            plots.check("--plot", options.plot),
        )
    if options.json and job.first:
        write_asked("--json", options.json, "".join(f"{json.dumps(result)}\n" for result in results))


def train(config: Config, names: list[str], options) -> list[dict]:
    """The measurements of maxsep and of the peers `names`; those that could not run have only `system` and `error`."""
    from maxsep.measure import flops, hlo, memory, parts
    from maxsep.output import console
    from maxsep.training.run import Run

    run = Run(config, end_of_text=0)  # any id: what it costs to keep attention within documents does not depend on it
    print(console.table(f"bench train: {config.name}", run.described()), flush=True)
    say("maxsep: compiling")
    step, product = Step(run), flops.Product(run.mesh, config.model.dtype)
    for _ in range(options.warmup):
        step()
    product()

    ours = facts(config) | {"bubble": run.bubble, "memory": memory.of_program(step.compiled)}
    results, turns = {"maxsep": ours}, {"maxsep": lambda steps: timed(step, steps)}
    with ExitStack() as stack:
        for name in names:
            say(f"{name}: compiling")
            try:
                peer = peers.Peer(name, options.peers, config, facts(config)["shape"], options.warmup)
            except peers.PeerError as e:
                say(f"warning: {e}")
                results[name] = {"system": name, "error": str(e)}
                continue
            stack.enter_context(peer)
            results[name], turns[name] = peer.facts, peer.turn

        taken, products = {name: [] for name in turns}, []
        for done in range(0, options.steps, options.turn):
            count = min(options.turn, options.steps - done)
            for name, turn in turns.items():
                taken[name].append(turn(count))
                say(f"{name}: {done + count}/{options.steps} steps, {min(taken[name][-1]['seconds']):.3f} s")
            products += timed(product, PRODUCTS)["seconds"]

    peak = product.flops / min(products)
    for name in turns:
        result = results[name] = measurement(results[name], taken[name])
        result["peak_flops"] = peak
        result["peak_share"] = flops.mfu(result["tokens_per_second"], run.flops / run.tokens, peak)
    if options.parts:
        say("maxsep: profiling")
        results["maxsep"]["parts"] = parts.measure(step, hlo.parse(step.compiled.as_text()))
    return list(results.values())


class Step:
    """The train step that `run` compiles, waited for, on a batch of random ids from a fixed seed."""

    def __init__(self, run):
        import jax
        import numpy as np

        rng, vocab = np.random.default_rng(0), run.config.model.vocab_size
        self.batch = jax.device_put(rng.integers(vocab, size=run.batch_shape, dtype=np.int32), run.batch_sharding)
        self.state, self.compiled = run.new_state(), run.compile_train_step()
        self.wait = jax.block_until_ready

    def __call__(self) -> None:
        self.state, metrics = self.compiled(self.state, self.batch)
        self.wait((self.state, metrics))


def facts(config: Config) -> dict:
    """What `measurement` says about maxsep's step besides its times."""
    import jax

    model, mesh = config.model, config.mesh
    return {
        "system": "maxsep",
        "version": f"jax {jax.__version__}",
        "task": "train",
        "shape": {
            "layers": model.layers,
            "d_model": model.d_model,
            "heads": model.heads,
            "kv_heads": model.n_kv_heads,
            "head_dim": model.head_size,
            "experts": model.experts,
            "top_k": model.top_k,
            "d_ff": model.d_ff,
            "vocab": model.vocab_size,
            "sequence": config.data.sequence_length,
            "batch": config.train.batch_size,
        },
        "dtype": model.dtype,
        "capacity_factor": model.capacity_factor,
        "devices": mesh.devices,
        "layout": config.layout,
        "mesh": mesh.sizes,
    }


def say(text: str) -> None:
    import jax

    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__, default_config="configs/bench.py", commands=COMMANDS))
