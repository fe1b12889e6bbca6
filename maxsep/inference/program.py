"""What runs on the devices: prefill, decoding, scoring. Each is one `jax.shard_map` over the whole mesh.

Prefill takes whole prompts, in the layout in which training takes sequences; its result is the first new token of each
and a cache of keys and values. Decoding is a loop over single tokens, in which the axes that split sequences split the
batch. Weights lie the same in both.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from maxsep.config import Config
from maxsep.config.layouts import AXES
from maxsep.inference.sampling import Sampling, sample
from maxsep.model.kv_cache import Prompts, Window
from maxsep.model.parameters import declared, drawn
from maxsep.model.tokens import documents
from maxsep.model.transformer import Transformer
from maxsep.output import tree
from maxsep.parallel import collectives
from maxsep.parallel.collectives import Axes
from maxsep.parallel.layout import Layout

HELD = ("cache", "window", "token_b", "tokens_bn", "logprobs_bn", "number_b", "length_b", "limit_b", "done_b")


@functools.partial(jax.tree_util.register_dataclass, data_fields=[*HELD, "made", "busy"], meta_fields=["slots"])
@dataclass(frozen=True)
class Decoding:
    """A batch whose prompts are in the cache.

    Rows are split as those of single tokens, `window`'s as in prefill. Outside of `jax.shard_map` what devices hold has
    a leading dimension for those that hold the same, or other layers.
    """

    cache: list  # what the attention of each layer keeps, of each stage
    window: Window
    token_b: jax.Array  # int32, the last token, not yet in the cache
    tokens_bn: jax.Array  # int32, the new tokens
    logprobs_bn: jax.Array  # float32 or wider, of each among all
    number_b: jax.Array  # int32, the prompt's number
    length_b: jax.Array  # int32, tokens of the prompt
    limit_b: jax.Array  # int32, the most new tokens
    done_b: jax.Array  # bool
    made: jax.Array  # int32, new tokens of each sequence that is not done
    busy: jax.Array  # bool, whether one is not
    slots: int  # of prompts


class Program:
    """The functions of one config, to be compiled under its mesh (`jax.set_mesh`).

    `end_of_text`, `ids` and `stops` are the tokenizer's: the id between documents, how many ids it has, and those that
    end a completion too. `platform` is that of the devices to compile for, by default this machine's. No token is
    dropped, whatever capacity the model was trained with.
    """

    def __init__(
        self,
        config: Config,
        end_of_text: int,
        ids: int | None = None,
        platform: str | None = None,
        stops: Sequence[int] = (),
    ):
        model = dataclasses.replace(config.model, capacity_factor=None, capacity_group=None)
        self.config, self.model, self.ends = config, model, (end_of_text, *stops)
        self.layout = Layout.of(config, platform).for_inference()
        self.single = self.layout.of_single_tokens()
        self.rows = self.single.ways("b")  # a batch is a multiple of it
        self.stages = self.layout.ways("l")
        # Attention within documents only, where the model was trained so.
        self.document_end = None if config.data.cross_document_attention else end_of_text

        declare = functools.partial(Transformer, model, ids=ids or model.vocab_size, dtype=model.dtype)
        self._stacked = declare(self.layout)
        self.abstract = declared(self._stacked)
        self._apart = {layout: declare(layout, apart=True) for layout in (self.layout, self.single)}
        specs = _together(jax.tree.map(lambda x: x.sharding.spec, self.abstract))
        self.weight_specs = {path: [spec] * self._layers(path) or spec for path, spec in specs.items()}

    def new(self) -> dict[str, dict]:
        """`params` and `buffers` drawn from the seed. Jit it: its arrays are then born in their shardings."""
        return drawn(self._stacked, self.config.train.seed)

    def _layers(self, path: tuple[str, ...]) -> int:
        """Of how many layers the programs take a parameter apart, so that no loop slices it; 0: it stays as it is.

        So do the experts', of which only those that are chosen are read.
        """
        if path[0] != "segments" or "experts" in path:
            return 0
        return len(self._apart[self.layout].segments[path[1]])

    def weights(self, variables: dict[str, dict]) -> dict:
        """What the programs take of `params` and `buffers`, by path: what is taken apart as a list of layers."""
        named = _together(variables)
        taken = {path: w for path, w in named.items() if self._layers(path)}

        def apart(taken):
            # Of one layer each, [1, ...]: of all stages' layers at this place.
            return {path: lax.split(w, [1] * self._layers(path)) for path, w in taken.items()}

        specs = {path: self.weight_specs[path] for path in taken}
        stacked = {path: of[0] for path, of in specs.items()}
        return named | jax.jit(jax.shard_map(apart, in_specs=(stacked,), out_specs=specs))(taken)

    def _merged(self, layout: Layout, weights: dict) -> Transformer:
        """The model on one device, its layers those of this stage."""
        transformer = self._apart[layout]
        leaves = {}
        for path, w in collectives.vary(weights).items():
            if path[0] != "segments":
                leaves[path] = w
                continue
            segment, name, *rest = path
            for layer in range(len(transformer.segments[name])):
                leaves[segment, name, layer, *rest] = w[layer][0] if self._layers(path) else w
        return nnx.merge(nnx.graphdef(transformer), tree.nested(leaves))

    def _prompt_states(self, weights, tokens_bs, length_b, attend, kept):
        """States [b, s, D] of this device's part of the prompts, and what each layer keeps."""
        transformer = self._merged(self.layout, weights)
        own = tokens_bs.shape[1] // self.layout.ways("s")
        column_s = collectives.index(self.layout.axes("s")) * own + jnp.arange(own)
        real_bs = column_s < length_b[:, None]
        with jax.named_scope("embedding"):
            x_bsd = transformer.embedding(tokens_bs, self.model.dtype)
        return transformer.infer(x_bsd, real_bs, attend, kept)

    def prefill(
        self, weights, tokens_bs: jax.Array, length_b, number_b, limit_b, sampling: Sampling, slots: int, most: int
    ) -> Decoding:
        """The first new token of prompts [B, S], right-padded, of `length_b` tokens each; 0 where there is no prompt.

        `slots` are those of the cache, `most` the most new tokens, `limit_b` the most of each sequence, from 1.
        """

        def on_device(weights, tokens_bs, length_b, number_b, limit_b, sampling):
            s = tokens_bs.shape[1]
            tokens_bs, length_b, number_b, limit_b = collectives.vary((tokens_bs, length_b, number_b, limit_b))
            segments_bs = documents(tokens_bs, self.document_end)
            last_b = jnp.maximum(length_b - 1, 0)
            pad_b = s - jnp.maximum(length_b, 1)
            first_b = pad_b
            if segments_bs is not None:
                at_end_b1 = jnp.take_along_axis(segments_bs, last_b[:, None], axis=1)
                first_b += jnp.argmax(segments_bs == at_end_b1, axis=1).astype(jnp.int32)

            prompts = Prompts(segments_bs, pad_b, slots)

            def attend(attention, x_bsd, _):
                return attention.prefill(x_bsd, prompts)

            empty = collectives.vary([attention.empty(len(tokens_bs), slots) for attention in self._attentions])
            x_bsd, cache = self._prompt_states(weights, tokens_bs, length_b, attend, empty)
            x_b1d, length_b, number_b, limit_b = self._last(x_bsd, last_b, length_b, number_b, limit_b)
            transformer = self._merged(self.single, weights)
            token_b, logprob_b = _next(transformer, x_b1d, sampling, number_b, length_b)
            tokens_bn, logprobs_bn = (
                jnp.zeros((x_b.size, most), x_b.dtype).at[:, 0].set(x_b) for x_b in (token_b, logprob_b)
            )
            done_b = self._ended(token_b) | (limit_b <= 1) | (length_b == 0)
            window = Window(pad_b, first_b)
            held = (cache, window, token_b, tokens_bn, logprobs_bn, number_b, length_b, limit_b, done_b)
            return _outside(Decoding(*collectives.vary(held), jnp.ones((), jnp.int32), _busy(done_b), s))

        rows = P(self.layout.axes("b"))
        return jax.shard_map(
            on_device,
            in_specs=(self.weight_specs, P(self.layout.axes("b"), None), rows, rows, rows, P()),
            out_specs=self._specs(tokens_bs.shape[1]),
        )(weights, tokens_bs, length_b, number_b, limit_b, sampling)

    def decode(self, weights, state: Decoding, sampling: Sampling, until: jax.Array) -> Decoding:
        """`state` when each sequence has `until` new tokens or is done. To be jitted with `state` donated."""
        specs = self._specs(state.slots)

        def on_device(weights, state, sampling, until):
            transformer = self._merged(self.single, weights)

            def one(state: Decoding) -> Decoding:
                slot = state.slots + state.made - 1

                def attend(attention, x_b1d, cache):
                    return attention.decode(x_b1d, cache, slot, state.window)

                with jax.named_scope("embedding"):
                    x_b1d = transformer.embedding(state.token_b[:, None], self.model.dtype)
                x_b1d, cache = transformer.infer(x_b1d, ~state.done_b[:, None], attend, state.cache)
                position_b = state.length_b + state.made
                new_b, logprob_b = _next(transformer, x_b1d, sampling, state.number_b, position_b)
                token_b = jnp.where(state.done_b, state.token_b, new_b)
                tokens_bn, logprobs_bn = (
                    lax.dynamic_update_slice_in_dim(x_bn, x_b[:, None], state.made, axis=1)
                    for x_bn, x_b in ((state.tokens_bn, token_b), (state.logprobs_bn, logprob_b))
                )
                made = state.made + 1
                done_b = state.done_b | self._ended(token_b) | (made >= state.limit_b)
                return dataclasses.replace(
                    state,
                    cache=cache,
                    token_b=token_b,
                    tokens_bn=tokens_bn,
                    logprobs_bn=logprobs_bn,
                    done_b=done_b,
                    made=made,
                    busy=_busy(done_b),
                )

            return _outside(lax.while_loop(lambda state: state.busy & (state.made < until), one, _inside(state)))

        in_specs = (self.weight_specs, specs, P(), P())
        return jax.shard_map(on_device, in_specs=in_specs, out_specs=specs)(weights, state, sampling, until)

    def _ended(self, token_b: jax.Array) -> jax.Array:
        return functools.reduce(jnp.logical_or, [token_b == end for end in self.ends])

    def score(self, weights, tokens_bs: jax.Array, targets_bs: jax.Array, length_b: jax.Array) -> jax.Array:
        """Log-probabilities of `targets_bs` [B, S] after the `length_b` tokens [B, S] before them; 0 for -1.

        [copies, B, S]: the first dimension is for devices that hold the same.
        """

        def on_device(weights, tokens_bs, targets_bs, length_b):
            tokens_bs, targets_bs, length_b = collectives.vary((tokens_bs, targets_bs, length_b))
            segments_bs = documents(tokens_bs, self.document_end)

            def attend(attention, x_bsd, nothing):
                return attention.train(x_bsd, segments_bs), nothing

            nothing = [None] * len(self._attentions)
            x_bsd, _ = self._prompt_states(weights, tokens_bs, length_b, attend, nothing)
            transformer = self._merged(self.layout, weights)
            return transformer.log_probabilities(x_bsd, targets_bs)[None]

        whole = P(self.layout.axes("b"), None)
        return jax.shard_map(
            on_device,
            in_specs=(self.weight_specs, whole, whole, P(self.layout.axes("b"))),
            out_specs=_held(self.layout.axes("b"), self.layout.axes("s")),
        )(weights, tokens_bs, targets_bs, length_b)

    @property
    def _attentions(self) -> list:
        """Of this stage's layers, without weights."""
        return [block.attention for _, block in self._apart[self.layout].blocks]

    def _last(self, x_bsd: jax.Array, last_b: jax.Array, *of_rows: jax.Array) -> tuple[jax.Array, ...]:
        """The state [b, 1, D] of each sequence's token `last_b`, and `of_rows` [b], with rows as of single tokens."""
        axes = self.layout.axes("s")
        at_b = last_b - collectives.index(axes) * x_bsd.shape[1]
        here_b = (at_b >= 0) & (at_b < x_bsd.shape[1])
        x_b1d = jnp.take_along_axis(x_bsd, jnp.where(here_b, at_b, 0)[:, None, None], axis=1)
        x_b1d = collectives.reduce_scatter(jnp.where(here_b[:, None, None], x_b1d, 0), axes, 0)
        first = collectives.index(axes) * x_b1d.shape[0]
        return x_b1d, *(lax.dynamic_slice_in_dim(x_b, first, x_b1d.shape[0]) for x_b in of_rows)

    def _specs(self, slots: int) -> Decoding:
        def held(letters: str) -> P:
            return _held(*(self.layout.axes(letter) for letter in letters))

        row, prompt = _held(self.single.axes("b")), held("b")
        cache = [jax.tree.map(held, attention.split) for attention in self._attentions]
        return Decoding(cache, Window(prompt, prompt), *[row] * (len(HELD) - 2), P(), P(), slots)


def _together(variables: dict[str, dict]) -> dict[tuple[str, ...], object]:
    """Parameters and buffers by their path in the model."""
    return {path[1:]: x for path, x in tree.named(variables).items()}


def _next(transformer: Transformer, x_b1d: jax.Array, sampling: Sampling, number_b: jax.Array, position_b: jax.Array):
    """The next token of each sequence, and its log-probability among all."""
    scores_bv = transformer.logits(x_b1d)[:, 0]
    token_b = sample(scores_bv, sampling, number_b, position_b)
    score_b = jnp.take_along_axis(scores_bv, token_b[:, None], axis=1)[:, 0]
    return token_b, score_b - jax.nn.logsumexp(scores_bv, axis=-1)


def _held(*dims: Axes) -> P:
    """Sharding of an array whose dimensions are split over these axes, after one for the devices along all others."""
    others = tuple(axis for axis in AXES if not any(axis in axes for axes in dims))
    return P(others or None, *(axes or None for axes in dims))


def _outside(state: Decoding) -> Decoding:
    return _each_held(lambda x: x[None], state)


def _inside(state: Decoding) -> Decoding:
    return _each_held(lambda x: collectives.vary(x[0]), state)


def _each_held(f, state: Decoding) -> Decoding:
    return dataclasses.replace(state, **{name: jax.tree.map(f, getattr(state, name)) for name in HELD})


def _busy(done_b: jax.Array) -> jax.Array:
    return lax.psum(collectives.vary(jnp.any(~done_b).astype(jnp.int32)), AXES) > 0
