"""How long decoding takes: batches of random prompts, and the least time in which their weights can be read."""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np

from maxsep.config import Config, ModelConfig
from maxsep.config.matrices import matrices, sizes
from maxsep.inference.generate import Batch, Generator
from maxsep.inference.program import Program
from maxsep.inference.sampling import Sampling
from maxsep.measure import bandwidth, peers
from maxsep.measure.timing import OtherCPU, decoding, timed
from maxsep.model import experts
from maxsep.model.parameters import jitted_init

TURN = 8  # tokens between two looks at the clock
FORM_CALLS = 30


def sweep(
    config: Config,
    shape: dict[str, int],
    contexts: Sequence[int],
    batches: Sequence[int],
    new: int,
    repeats: int,
    names: Sequence[str] = (),
    folder: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict]:
    """A measurement of each context and batch size, and of each peer's ways to do the same, in turns.

    Args:
        config: the model and its mesh, which must be set.
        shape: what a measurement tells of the model.
        contexts, batches: tokens of a prompt, and prompts.
        new: tokens of each prompt.
        repeats: how often each batch is decoded and timed; the first time, and beside peers every other, is not.
        names, folder: peers, and where they are set up.
        say: told of what is being done.
    """
    program = Program(config, end_of_text=-1)
    ours, speed = generator(program), bandwidth.read()
    for context, batch in itertools.product(contexts, batches):
        size = shape | {"batch": batch, "context": context, "new": new}
        say(f"maxsep: batch {batch}, context {context}")
        decoder = Decoder(ours, batch, context, new)
        decoder(1)
        facts = {"maxsep": {"system": "maxsep", "version": f"jax {jax.__version__}", **_facts(program, decoder)}}
        run = {"maxsep": decoder}
        with ExitStack() as stack:
            for name, variant in _variants(names, batch):
                label = f"{name} {variant or ''}".strip()
                say(f"{label}: batch {batch}, context {context}")
                try:
                    peer = stack.enter_context(peers.Peer(name, folder, config, size, 1, "decode", variant))
                except peers.PeerError as error:
                    say(f"warning: {error}")
                    yield {"system": label, "error": str(error)}
                    continue
                facts[label], run[label] = peer.facts, peer.turn
            turns = {label: [] for label in run}
            for _ in range(repeats):
                for label, turn in run.items():
                    turns[label].append(turn(1) if len(run) == 1 else second(turn(2)))
        floor = floor_bytes(config.model, batch, context + new / 2) / speed
        for label, taken in turns.items():
            result = decoding({"task": "decode", "dtype": config.model.dtype} | facts[label] | {"shape": size}, taken)
            result["floor_seconds"], result["floor_share"] = floor, floor / result["tpot_seconds"]["p50"]
            yield result


def second(turn: dict) -> dict:
    """Of a turn of two generations the second: a pause, in which another system had the caches, slows the first."""
    return turn | {name: turn[name][len(turn[name]) // 2 :] for name in ("prefill", "seconds")}


def forms(model: ModelConfig, platform: str, batches: Sequence[int]) -> Iterator[dict]:
    """Seconds of a layer's experts on the tokens of each batch, in every form, and the form that the rule chooses."""
    rng = np.random.default_rng(0)
    inputs, kernel = 2 if model.activation == "swiglu" else 1, experts.kernel(model, platform)
    shape = (1, model.experts, model.d_model, model.d_ff)
    w_in = [jnp.asarray(rng.normal(size=shape) / shape[2] ** 0.5, model.dtype) for _ in range(inputs)]
    w_out = jnp.asarray(rng.normal(size=(*shape[:2], *shape[:1:-1])) / shape[3] ** 0.5, model.dtype)
    for batch in batches:
        ids = np.array([rng.permutation(model.experts)[: model.top_k] for _ in range(batch)])
        rows_e = jnp.asarray(np.bincount(ids.ravel(), minlength=model.experts), jnp.int32)
        x_rd = jnp.asarray(rng.normal(size=(ids.size, model.d_model)), model.dtype)
        seconds = {}
        for form in experts.forms(kernel):
            product = jax.jit(functools.partial(experts.product, form, model.activation, layer=0))
            call = functools.partial(product, x_rd, rows_e, w_in, w_out)
            call().block_until_ready()
            taken = timed(lambda call=call: call().block_until_ready(), FORM_CALLS)["seconds"]
            seconds[str(form)] = statistics.median(taken)
        chosen = experts.form(kernel, ids.size, model.experts)
        yield {"task": "experts", "batch": batch, "rows": ids.size, "seconds": seconds, "chosen": str(chosen)}


def _facts(program: Program, decoder: "Decoder") -> dict:
    config, mesh = program.config, program.config.mesh
    # Of the rows that a device's experts may get in a step of decoding.
    split = program.single.ways("b") // program.single.ways("e") // program.single.ways("f")
    kernel = experts.kernel(config.model, program.layout.platform)
    rows = max(1, decoder.batch.shape[0] // max(1, split)) * config.model.top_k
    return {
        "devices": mesh.devices,
        "layout": config.layout,
        "mesh": mesh.sizes,
        "experts_form": experts.form(kernel, rows, config.model.experts // program.single.ways("e")),
    }


def _variants(names: Sequence[str], batch: int) -> Iterator[tuple[str, str | None]]:
    for name in names:
        if name != "transformers":
            yield name, None
            continue
        yield name, "grouped_mm"
        yield name, "eager"
        if batch == 1:  # it copies the weights of every token's experts: minutes for a batch of prompts
            yield name, "batched_mm"


class Decoder:
    """One batch of prompts of random ids, the same ones again and again, on the mesh that `jax.set_mesh` has set."""

    def __init__(self, generator: Generator, batch: int, context: int, new: int):
        rng, vocab = np.random.default_rng(0), generator.program.model.vocab_size
        prompts = rng.integers(vocab, size=(batch, context)).tolist()
        self.generator, self.new = generator, new
        self.batch = Batch(generator.program, prompts, [new] * batch)

    def __call__(self, count: int) -> dict:
        """Decodes it `count` times: seconds to the first tokens (`prefill`) and of each token after; `other_cpu`."""
        others, prefill, seconds = OtherCPU(), [], []
        for _ in range(count):
            for turn in self.generator.turns(self.batch, Sampling.of(0.0), TURN):
                if turn.before == 0:
                    prefill.append(turn.end)
                else:
                    made = turn.made - turn.before
                    seconds += [(turn.end - turn.start) / made] * made
        return {"prefill": prefill, "seconds": seconds, "other_cpu": others.cores()}


def generator(program: Program) -> Generator:
    """With weights from the seed, which no text ends."""
    return Generator(program, program.weights(jitted_init(program.new, program.layout.platform)()))


def floor_bytes(model: ModelConfig, batch: int, context: float) -> float:
    """Bytes that one step of decoding must read, of `batch` sequences of `context` tokens on average, in all.

    Weights once: attention, norms, routers, the output head, and the experts that at least one token chooses where all
    are as likely, E × (1 - (1 - k / E)^B); and the cache.
    """
    itemsize = {"float64": 8, "float32": 4, "bfloat16": 2}[model.dtype]
    weights = sum(matrix.size(sizes(model)) * (1 - (1 - matrix.used) ** batch) for matrix in matrices(model))
    cache = model.layers * batch * context * 2 * model.n_kv_heads * model.head_size
    return itemsize * (weights + cache)
