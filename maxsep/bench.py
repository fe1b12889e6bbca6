"""Measures speed: `bench train` times the training step.

The step is the program that train.py runs, on a batch of random ids that is used again. With --peers other systems
time the same step, each in its own process, in turns of a few steps, so that whatever else the machine does slows
all of them. The peak is that of square matrix products on the same devices, measured between the turns.
"""

import json
import sys
from contextlib import ExitStack

from absl import flags

from maxsep.config import Config, ConfigError, cli, paths
from maxsep.measure import peers
from maxsep.measure.timing import measurement, timed
from maxsep.parallel.start import start

QUIET = 0.1  # cores that other processes may keep busy
PRODUCTS = 3  # matrix products a turn


def define(values: flags.FlagValues) -> None:
    def integer(name, default, text):
        flags.DEFINE_integer(name, default, text, lower_bound=1, flag_values=values)

    integer("steps", 20, "timed steps")
    integer("warmup", 3, "steps before the first that is timed")
    integer("turn", 5, "steps until the next system's turn")
    flags.DEFINE_string("peers", None, "folder that benchmarks/peers/setup.sh made: compare", flag_values=values)
    flags.DEFINE_boolean("parts", False, "also profile the parts of the step (on a CPU)", flag_values=values)
    flags.DEFINE_string("json", None, "file to write, a JSON object a measurement", flag_values=values)


def main(args: cli.Args) -> None:
    options = args.flags
    names = []
    if options.peers:
        names = peers.installed(options.peers)
        peers.check(args.config)
    if options.json:
        paths.to_write("--json", options.json)
    config = start(args.config, fit_mesh=False)

    import jax

    from maxsep.parallel.mesh import make_mesh

    if (options.parts or names) and jax.default_backend() != "cpu":
        flag = "--peers" if names else "--parts"
        raise ConfigError(f"{flag}: got {jax.default_backend()} devices; takes the CPU's, as with JAX_PLATFORMS=cpu")
    with jax.set_mesh(make_mesh(config)):
        results = train(config, names, options)
    print(report(results), flush=True)
    if options.json:
        lines = "".join(f"{json.dumps(result)}\n" for result in results)
        paths.to_write("--json", options.json).write_text(lines, encoding="utf-8")


def train(config: Config, names: list[str], options) -> list[dict]:
    """The measurements of maxsep and of the peers `names`; those that could not run have only `system` and `error`."""
    from maxsep.measure import flops, memory, parts
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
        results["maxsep"]["parts"] = parts.measure(step, step.compiled.as_text())
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
        "mesh": {"stage": mesh.stage, "attention": mesh.attention, "expert": mesh.expert},
    }


def report(results: list[dict]) -> str:
    """The figures as a table."""
    ours = results[0]
    lines = [f"\npeak: {ours['peak_flops'] / 1e9:,.0f} GFLOP/s in matrix products on these devices\n"]
    rows = [("system", "devices", "median s", "p10-p90", "fastest", "tokens/s", "of peak", "x maxsep", "other cores")]
    for result in results:
        if "error" in result:
            rows.append((result["system"], result["error"]))
            continue
        mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
        others = result["other_cpu"]
        rows.append(
            (
                result["system"],
                f"{result['devices']}" + (f" ({mesh})" if mesh else ""),
                f"{result['median_seconds']:.4f}",
                f"{result['p10_seconds']:.4f}-{result['p90_seconds']:.4f}",
                f"{result['min_seconds']:.4f}",
                f"{result['tokens_per_second']:,.0f}",
                f"{result['peak_share']:.1%}",
                f"{result['median_seconds'] / ours['median_seconds']:.2f}",
                "?" if others is None else f"{others:.2f}",
            )
        )
    lines += columns(rows)
    if ours.get("memory"):
        lines += [
            "",
            "MB a device, by the compiler: " + ", ".join(f"{k} {v / 1e6:.1f}" for k, v in ours["memory"].items()),
        ]
    if any((result.get("other_cpu") or 0) > QUIET for result in results):
        lines += ["", f"warning: other processes kept more than {QUIET} cores busy; these figures say little"]
    if "parts" in ours:
        shares = [(part, f"{share:.1%}") for part, share in ours["parts"].items()]
        lines += ["", *columns([("part of the step", "share"), *shares])]
        if "communication" in ours["parts"]:
            lines += ["communication includes waiting for other devices"]
    return "\n".join(lines)


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned lines, the first column to the left; a row shorter than the first is not aligned past its first cell."""
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    lines = []
    for name, *cells in rows:
        aligned = len(cells) + 1 == len(rows[0])
        cells = [f"{cell:>{width}}" if aligned else cell for cell, width in zip(cells, widths[1:], strict=False)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *cells]))
    return lines


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__, default_config="configs/bench.py", commands=("train",)))
